"""Architectures of transformers that the engine does not have: experts, encoders, and layers of other kinds."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers.core_model_loading import Chunk, WeightConverter

from entrollm import CompressOptions, _core, compress
from entrollm.cli.console import describe_error
from entrollm.compress.export import export
from entrollm.errors import FormatError, UnsupportedError
from entrollm.format.reader import CompressedModel
from entrollm.hf import CodedStack, CodedWeight, EntroConfig, EntroEmbedding, EntroLinear, experts
from tests.torch.models import difference, ids, write_coded

# Name: class of the configuration, class of the model, and options.
ARCHITECTURES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "qwen3-moe": (
        "Qwen3MoeConfig",
        "AutoModelForCausalLM",
        {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "head_dim": 16},
    ),
    "mixtral": ("MixtralConfig", "AutoModelForCausalLM", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "gpt-oss": (
        "GptOssConfig",
        "AutoModelForCausalLM",
        {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 16, "intermediate_size": 64},
    ),
    "llama4": (
        "Llama4TextConfig",
        "AutoModelForCausalLM",
        {"num_local_experts": 4, "num_experts_per_tok": 1, "head_dim": 16, "intermediate_size_mlp": 128},
    ),
    "bert": ("BertConfig", "AutoModelForMaskedLM", {}),
    "gpt2": ("GPT2Config", "AutoModelForCausalLM", {"n_embd": 96, "n_layer": 2, "n_head": 6}),
    "gemma3": ("Gemma3TextConfig", "AutoModelForCausalLM", {"head_dim": 16, "pad_token_id": 0}),
    "t5": (
        "T5Config",
        "AutoModelForSeq2SeqLM",
        {"d_model": 96, "d_ff": 128, "num_layers": 2, "num_heads": 6, "d_kv": 16, "decoder_start_token_id": 0},
    ),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A function from an architecture to its compressed folder."""
    made: dict[str, Path] = {}

    def get(name: str) -> Path:
        if name not in made:
            config, kind, options = ARCHITECTURES[name]
            place = tmp_path_factory.mktemp(name)
            made[name] = write_coded(place, config=config, kind=kind, **options)
        return made[name]

    return get


def open_model(name: str, path: Path, **options: Any) -> Any:
    return getattr(transformers, ARCHITECTURES[name][1]).from_pretrained(path, dtype=torch.float32, **options)


def answer(model: Any) -> torch.Tensor:
    inputs = {"input_ids": ids(batch=2)}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = ids(count=5, batch=2)
    with torch.no_grad():
        found: torch.Tensor = model(**inputs).logits
    return found


@pytest.mark.parametrize("name", list(ARCHITECTURES))
def test_coded_model_is_like_its_export_and_is_saved_whole(
    name: str, folder: Callable[[str], Path], tmp_path: Path
) -> None:
    coded = folder(name)
    model = open_model(name, coded)
    with CompressedModel.open(coded) as stored:
        export(stored, tmp_path / "f32", _core.ThreadPool(1), "f32")
        assert {m.name for m in model.modules() if isinstance(m, CodedWeight)} == set(stored.specs)
    assert difference(answer(model), answer(open_model(name, tmp_path / "f32"))) < 1e-3
    model.save_pretrained(tmp_path / "saved")
    with CompressedModel.open(tmp_path / "saved") as saved, CompressedModel.open(coded) as stored:
        assert dict(saved.specs) == dict(stored.specs)
        assert set(saved.plain) == set(stored.plain)
    assert torch.equal(answer(open_model(name, tmp_path / "saved")), answer(model))


@pytest.mark.parametrize("name", ["qwen3-moe", "gpt-oss", "gpt2", "t5"])
def test_live_quantization_gives_the_same_model(name: str, folder: Callable[[str], Path]) -> None:
    model = open_model(name, folder(name).parent / "source", quantization_config=EntroConfig(bits=4))
    assert torch.equal(answer(model), answer(open_model(name, folder(name))))


def test_experts_are_coded_one_by_one(folder: Callable[[str], Path]) -> None:
    model = open_model("qwen3-moe", folder("qwen3-moe"))
    experts = model.model.layers[0].mlp.experts
    assert isinstance(experts.gate_up_proj, CodedStack)
    assert experts.gate_up_proj.shape == (4, 128, 96)
    assert experts.gate_up_proj[3].shape == (128, 96)
    assert isinstance(model.model.layers[0].mlp.gate.weight, CodedWeight)
    x = torch.randn(5, 96)
    expected = x @ experts.gate_up_proj[2].T
    assert torch.allclose(experts.gate_up_proj.multiply(2, x), expected, atol=1e-3)


def test_experts_skip_tokens_that_have_none(folder: Callable[[str], Path]) -> None:
    """Expert parallelism marks tokens of other devices with an index beyond the experts."""
    experts = open_model("qwen3-moe", folder("qwen3-moe")).model.layers[0].mlp.experts
    x, weights = torch.randn(3, 96), torch.rand(3, 2)
    chosen = torch.tensor([[0, 1], [4, 2], [4, 4]])
    with torch.no_grad():
        found = experts(x, chosen, weights)
        alone = experts(x[1:2], torch.tensor([[2, 2]]), torch.stack([weights[1, 1:2], torch.zeros(1)], 1))
    assert torch.equal(found[2], torch.zeros(96))
    assert torch.allclose(found[1], alone[0], atol=1e-5)


def test_encoder_without_its_head(folder: Callable[[str], Path]) -> None:
    model = transformers.AutoModel.from_pretrained(folder("bert"))
    assert isinstance(model.embeddings.word_embeddings, EntroEmbedding)
    assert isinstance(model.encoder.layer[0].attention.self.query, EntroLinear)
    assert isinstance(open_model("bert", folder("bert")).cls.predictions.decoder, EntroLinear)


def test_new_head_is_initialized(folder: Callable[[str], Path]) -> None:
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder("bert"))
    assert type(model.classifier) is torch.nn.Linear
    assert 0 < model.classifier.weight.std() < 0.1


def test_partly_kept_experts_are_refused(folder: Callable[[str], Path], tmp_path: Path) -> None:
    source = folder("mixtral").parent / "source"
    compress(source, tmp_path / "coded", CompressOptions(keep=["*experts.0.w1*"]))
    message = r"gate_up_proj is made of .*experts\.0\.w1\.weight, which is kept in its type, and of coded matrices"
    with pytest.raises(UnsupportedError, match=message):
        open_model("mixtral", tmp_path / "coded")
    with pytest.raises(UnsupportedError, match=message):
        open_model("mixtral", source, quantization_config=EntroConfig(keep=["*experts.0.w1*"]))


@pytest.mark.parametrize(
    ("target", "error", "message"),
    [
        ("qkv_proj", UnsupportedError, r"transformers makes .*qkv_proj\.weight of it by Chunk"),
        ("o_proj", FormatError, r"o_proj\.weight: several matrices of the folder belong to it"),
    ],
)
def test_rearranged_matrices_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, target: str, error: type[Exception], message: str
) -> None:
    coded = write_coded(tmp_path, config="Phi3Config")
    chunk = WeightConverter("self_attn.qkv_proj.weight", [f"self_attn.{target}.weight"], [Chunk(0)])
    monkeypatch.setattr("entrollm.hf.names.get_model_conversion_mapping", lambda model: [chunk])
    with pytest.raises(error, match=message) as raised:
        open_model("gpt2", coded)
    if error is UnsupportedError:
        name = f"model.layers.0.self_attn.{target}.weight"
        assert str(raised.value).endswith(f"keep it in its type with keep=['{name}']")
        assert describe_error(raised.value).endswith(f"keep it in its type with --keep {name}")


def test_missing_expert_is_refused(folder: Callable[[str], Path], tmp_path: Path) -> None:
    shutil.copytree(folder("mixtral").parent / "source", tmp_path / "source")
    drop_tensor(tmp_path / "source", "model.layers.1.block_sparse_moe.experts.2.w3.weight")
    compress(tmp_path / "source", tmp_path / "coded", CompressOptions())
    with pytest.raises(FormatError, match=r"gate_up_proj: the folder does not have all matrices that belong to it"):
        open_model("mixtral", tmp_path / "coded")


def drop_tensor(checkpoint: Path, name: str) -> None:
    index_path = checkpoint / "model.safetensors.index.json"
    index = json.loads(index_path.read_text())
    file = checkpoint / index["weight_map"].pop(name)
    state = load_file(file)
    del state[name]
    save_file(state, file, {"format": "pt"})
    index_path.write_text(json.dumps(index))


def test_configuration_of_another_model_is_refused(tmp_path: Path) -> None:
    coded = write_coded(tmp_path)
    config = (coded / "config.json").read_text().replace('"intermediate_size": 128', '"intermediate_size": 192')
    (coded / "config.json").write_text(config)
    (coded / "entrollm_checksums.json").unlink()  # edited on purpose
    with pytest.raises(FormatError, match=r"the model's .* has shape \[96, 192\], the folder's \[96, 128\]"):
        open_model("gpt2", coded)


@pytest.mark.parametrize("tokens", [0, 1, 5])
@pytest.mark.parametrize("name", ["qwen3-moe", "mixtral"])
def test_experts_at_once_and_one_by_one_agree(folder: Callable[[str], Path], name: str, tokens: int) -> None:
    layer = open_model(name, folder(name)).model.layers[0].mlp.experts
    generator = torch.Generator().manual_seed(tokens)
    chosen = torch.randint(0, 5, (tokens, 2), generator=generator)  # 4 means none
    call = layer, torch.randn(tokens, 96, generator=generator), chosen, torch.rand(tokens, 2, generator=generator)
    with torch.no_grad():
        wanted, found = experts._one_by_one(*call), experts._together(*call)
    torch.testing.assert_close(found, wanted)
