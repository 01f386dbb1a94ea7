"""Statistics that are measured layer by layer equal those of autograd through the whole model."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from numpy.typing import NDArray

from entrollm.calibrate import measure
from entrollm.calibrate.lockstep import Lockstep
from entrollm.calibrate.network import Network
from entrollm.calibrate.sums import draw_labels
from entrollm.checkpoint.model_folder import Checkpoint
from entrollm.errors import FormatError, UnsupportedError
from entrollm.format import layout
from entrollm.torch.device import TorchDevice
from tests.checkpoint.test_gguf_metadata import write_random
from tests.engine.architectures import ARCHITECTURES

VOCABULARY = 211
_SMALL = {"vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
_HEADS = {"num_attention_heads": 4, "max_position_embeddings": 64}
_T5 = {"vocab_size": VOCABULARY, "d_model": 32, "d_ff": 48, "d_kv": 8, "num_heads": 4, "num_layers": 2}
_SHARED_KEYS: dict[str, Any] = {
    **_SMALL,
    **_HEADS,
    "num_hidden_layers": 4,
    "num_kv_shared_layers": 2,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "hidden_size_per_layer_input": 8,
    "vocab_size_per_layer_input": VOCABULARY,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "sliding_window": 9,
}
_OTHERS: dict[str, tuple[str, dict[str, Any]]] = {
    "bert": ("BertForMaskedLM", {**_SMALL, **_HEADS}),
    "t5": ("T5ForConditionalGeneration", {**_T5, "decoder_start_token_id": 0}),
    "falcon": ("FalconForCausalLM", {**_SMALL, **_HEADS, "bos_token_id": 1, "eos_token_id": 2}),
    "gpt_oss": (
        "GptOssForCausalLM",
        {**_SMALL, **_HEADS, "num_key_value_heads": 2, "head_dim": 8, "num_local_experts": 4, "sliding_window": 9},
    ),
    "funnel": (
        "FunnelForMaskedLM",
        {
            "vocab_size": VOCABULARY,
            "d_model": 32,
            "n_head": 4,
            "d_head": 8,
            "d_inner": 48,
            "block_sizes": [1, 1],
            "tie_word_embeddings": False,
        },
    ),
    # Those below are measured as a whole: they run a layer twice, share keys and values, or share a block of layers.
    "albert": ("AlbertForMaskedLM", {**_SMALL, **_HEADS, "embedding_size": 16, "num_hidden_layers": 3}),
    "gemma3n": ("Gemma3nForCausalLM", {**_SHARED_KEYS, "activation_sparsity_pattern": [0.0] * 4, "laurel_rank": 4}),
    "gemma4": ("Gemma4ForCausalLM", {**_SHARED_KEYS, "global_head_dim": 8}),
    "zamba2": (
        "Zamba2ForCausalLM",
        {
            **_SMALL,
            **_HEADS,
            "num_hidden_layers": 4,
            "layers_block_type": ["hybrid", "mamba", "hybrid", "hybrid"],
            "num_key_value_heads": 4,
            "num_mem_blocks": 1,
            "adapter_rank": 4,
            "mamba_d_state": 8,
            "mamba_headdim": 16,
            "n_mamba_heads": 4,
            "mamba_ngroups": 1,
            "chunk_size": 8,
        },
    ),
}
OF_THE_ENGINE = ("llama-tied", "qwen3-window", "gemma3", "gemma4_unified", "nemotron_h", "gpt2", "mixtral")
AS_A_WHOLE = ("albert", "gemma3n", "gemma4", "zamba2")
# Windows that suit the models above and those of the engine's tests.
WINDOWS = np.random.default_rng(4).integers(0, VOCABULARY, (3, 24))
# Parameters with several dimensions that no product is seen of: biases of experts, convolutions, Funnel's positions.
NO_MATRICES = ("_proj_bias", ".conv1d.", ".attention.r_", ".seg_embed.")
# Members of stacks and positions have one sum over all windows, which is another estimate of the same.
ONE_WINDOW = ("mixtral", "nemotron_h", "gpt_oss", "gpt2", "bert", "t5")


def save_model(name: str, folder: Path) -> Path:
    """A small random model."""
    if name not in _OTHERS:
        return ARCHITECTURES[name](folder)
    torch.manual_seed(3)
    kind, options = _OTHERS[name]
    model_class = getattr(transformers, kind)
    model = model_class(model_class.config_class(**options))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return folder


def inputs(network: Network, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"input_ids": ids} | ({"decoder_input_ids": ids} if network.model.config.is_encoder_decoder else {})


def whole_model(network: Network, windows: NDArray[np.int64]) -> dict[str, float]:
    """The sum of the squares of each matrix's gradient over windows, by autograd."""
    ids = torch.from_numpy(windows)
    with torch.no_grad():
        logits = network.model(**inputs(network, ids)).logits
    _, labels = draw_labels(logits.flatten(0, 1).clone(), np.random.default_rng(0).random(windows.size))
    names = list(network.views)
    weights = {matrix.pieces[0].name: matrix for matrix in network.matrices.values()}
    parameters = [parameter.requires_grad_() for parameter in network.model.parameters()]
    places = {address.data_ptr(): address for address in parameters}
    sums = dict.fromkeys(names, 0.0)
    for window, wanted in zip(ids, labels.reshape(windows.shape), strict=True):
        network.model.zero_grad()
        predicted = network.model(**inputs(network, window[None])).logits[0]
        torch.nn.functional.cross_entropy(predicted, wanted, reduction="sum").backward()
        for matrix in weights.values():
            stack = network.model.get_parameter(matrix.stack).grad if matrix.stack else None
            for piece in matrix.pieces:
                view = network.views[piece.name]
                if stack is None:
                    gradient = places[view.data_ptr()].grad
                else:
                    offset = view.data_ptr() - network.model.get_parameter(matrix.stack).data_ptr()
                    begin = offset // view.element_size()
                    gradient = stack.reshape(-1)[begin : begin + view.numel()]
                assert gradient is not None
                sums[piece.name] += float(gradient.double().square().sum())
    return sums


@pytest.mark.parametrize("name", [*OF_THE_ENGINE, *_OTHERS])
def test_shares_are_those_of_the_whole_model(name: str, tmp_path: Path) -> None:
    torch.set_num_threads(1)
    (tmp_path / "model").mkdir()
    folder = save_model(name, tmp_path / "model")
    windows = WINDOWS[:1] if name in ONE_WINDOW else WINDOWS
    (tmp_path / "statistics").mkdir()
    with Checkpoint.open(folder) as checkpoint:
        statistics = measure(checkpoint, windows, tmp_path / "statistics")
        network = Network(checkpoint, TorchDevice("cpu"))
        network.load_all()
        kind = json.loads((folder / "config.json").read_text())["architectures"][0]
        reference = getattr(transformers, kind).from_pretrained(folder, dtype=torch.float32).eval()
        ids = torch.from_numpy(windows)
        with torch.no_grad():
            found, expected = (model(**inputs(network, ids)).logits for model in (network.model, reference))
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
        sums = whole_model(network, windows)
        measured = {key: statistics.sensitivity(key) for key in sums}
        for key, total in sums.items():
            if any(part in key for part in NO_MATRICES):
                continue
            if ".position_embeddings." in key and len(windows) > 1:
                continue  # one sum over all windows
            sensitivity, factor = measured[key], statistics.factor(key)
            assert sensitivity is not None, key
            assert factor is not None, key
            view = network.views[key]
            assert factor.shape == (view.shape[1], view.shape[1])
            is_vocabulary = view.shape[0] == network.model.config.vocab_size
            if total:  # an expert without a token gets a guess
                share = total / windows.size / 2 * float(view.square().mean())
                # Look-ups and products with a tied embedding are added up apart.
                assert sensitivity.share == pytest.approx(share, rel=0.02 if is_vocabulary else 1e-3), key
            assert (sensitivity.row_weights is not None) == is_vocabulary, key
        known = [key for key in sums if statistics.factor(key) is not None]
        assert set(statistics.order) <= set(known)
        assert set(statistics.streams) <= set(known)
    assert {path.name.split("-")[0] for path in (tmp_path / "statistics").iterdir()} == {"factor"}


def test_an_expert_with_few_tokens_follows_the_others(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    save_model("mixtral", folder)
    (tmp_path / "statistics").mkdir()
    with Checkpoint.open(folder) as checkpoint:
        statistics = measure(checkpoint, WINDOWS[:1, :2], tmp_path / "statistics")
        experts = [name for name in checkpoint.tensors if ".layers.0." in name and name.endswith(".w1.weight")]
    factors = [statistics.factor(name) for name in experts]
    assert len(factors) > 2
    for factor in factors[1:]:
        assert factor is not None
        assert factors[0] is not None
        moments = factor @ factor.T
        np.testing.assert_allclose(moments, factors[0] @ factors[0].T, atol=0.2 * float(moments.max()))


def test_stacks_that_compression_has_split_are_put_together(tmp_path: Path) -> None:
    folder = save_model("gpt_oss", tmp_path)
    with Checkpoint.open(folder) as checkpoint:
        whole = Network(checkpoint, TorchDevice("cpu"))
        whole.load(0)
        stack = "model.layers.0.mlp.experts.down_proj"
        checkpoint.split({stack: [layout.member_name(stack, index) for index in range(4)]})
        split = Network(checkpoint, TorchDevice("cpu"))
        split.load(0)
    assert list(whole.views) == list(split.views)
    for name, view in whole.views.items():
        torch.testing.assert_close(view, split.views[name])


def test_experts_that_are_transposed_are_refused(tmp_path: Path) -> None:
    write_random(tmp_path)
    with (
        Checkpoint.open(tmp_path / "model.gguf") as checkpoint,
        pytest.raises(UnsupportedError, match=r"\.T is a matrix that transformers holds transposed.*without it"),
    ):
        Network(checkpoint, TorchDevice("cpu"))


class Layers(torch.nn.Module):
    """Two layers, run in the order of `plan`."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList([torch.nn.Linear(2, 2) for _ in range(2)])

    def forward(self, x: torch.Tensor, plan: list[int]) -> torch.Tensor:
        for index in plan:
            x = self.layers[index](x)
        return x


def run(plans: list[list[int]]) -> list[torch.Tensor]:
    """What a model of two layers gives of ones, in lockstep."""
    model, results = Layers(), []
    torch.nn.init.eye_(next(model.layers.parameters()))
    lockstep = Lockstep(list(model.layers), ["first", "second"])

    def work(plan: list[int]) -> Callable[[], None]:
        return lambda: results.append(model(torch.ones(1, 2), plan))

    try:
        for index, calls in lockstep.run([work(plan) for plan in plans]):
            assert isinstance(index, int)
            for call in calls:
                call.result = lockstep.forward(index, call.args, call.kwargs)
    finally:
        lockstep.close()
    assert len(results) == len(plans)
    torch.testing.assert_close(results[0], model(torch.ones(1, 2), plans[0]))
    return results


def test_batches_go_through_layers_side_by_side() -> None:
    assert len(run([[0, 1], [0, 1]])) == 2


def test_batches_that_go_different_ways_are_refused() -> None:
    with pytest.raises(UnsupportedError, match="the layers that run depend on the text: first, second"):
        run([[0, 1], [1]])


def test_a_layer_that_runs_twice_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="first: the model runs it more than once"):
        run([[0, 0]])


def test_an_error_in_the_model_reaches_the_caller() -> None:
    with pytest.raises(IndexError):
        run([[0, 7]])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"intermediate_size": 129}, r"gate_proj.weight: config.json asks for shape \[129, 96\], found \[128, 96\]"),
        ({"attention_bias": True}, r"has no tensor for model.layers.0.self_attn.q_proj.bias, of shape \[96\]"),
        ({"model_type": "unheard-of"}, r"does not know the model_type 'unheard-of'; compress it without calibration"),
    ],
)
def test_a_model_that_its_configuration_does_not_fit_is_named(
    change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    folder = ARCHITECTURES["llama"](tmp_path)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | change))
    with Checkpoint.open(folder) as checkpoint, pytest.raises((FormatError, UnsupportedError), match=message):
        measure(checkpoint, WINDOWS, tmp_path)
