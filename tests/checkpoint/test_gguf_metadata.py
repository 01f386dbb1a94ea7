"""Every key of a GGUF file's metadata is used, checked or refused; the values are those of llama.cpp."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer

from entrollm import CompressOptions, _core, compress
from entrollm.checkpoint.gguf_architectures import ARCHITECTURES
from entrollm.checkpoint.gguf_hybrids import HYBRIDS
from entrollm.checkpoint.gguf_latent import LATENT
from entrollm.checkpoint.gguf_metadata import _FIXED, _INERT, _USED
from entrollm.checkpoint.gguf_tokenizer import convert_tokenizer
from entrollm.checkpoint.model_folder import Checkpoint
from entrollm.compress.export import export
from entrollm.engine.check import why_not_run
from entrollm.errors import FormatError, UnsupportedError
from entrollm.format.reader import CompressedModel
from entrollm.models import read_config
from entrollm.models.config import ModelConfig
from entrollm.models.config_fields import Fields
from tests.checkpoint.gguf_layers import LAYERED, shapes_of
from tests.support.gguf_sources import GgufSource, file_name, llama_values
from tests.support.quantized_sources import LINEARS, plain_tensors

Tensor = tuple[str, tuple[int, ...], int, bytes]


_MLP_NORM = "blk.0.ffn_norm.weight"
EXPERTS, EXPERT_SIZE = 3, 64
MIXTURES = ("qwen2moe", "qwen3moe", "olmoe", "gpt-oss")


def tensor(name: str, *shape: int) -> Tensor:
    return name, shape, 1, np.zeros(shape, np.float16).tobytes()


def whole(architecture: str = "llama", values: dict[str, Any] | None = None, *more: Tensor) -> GgufSource:
    """The small model with every tensor, of an architecture; None as a value removes its key."""
    changed = llama_values() | (values or {})
    if architecture in LAYERED:
        return _layered(architecture, values or {}, *more)
    if architecture in MIXTURES:
        sizes = {"llama.expert_feed_forward_length": EXPERT_SIZE}
        if architecture == "olmoe":
            sizes = {"llama.attention.head_count_kv": 4}
        changed = {"llama.expert_count": EXPERTS, "llama.expert_used_count": 2} | changed | sizes
    named = {key.replace("llama.", f"{architecture}.", 1): value for key, value in changed.items() if value is not None}
    source = GgufSource(named | {"general.architecture": architecture})
    for name, array in plain_tensors(np.random.default_rng(1)).items():
        source.tensors.append(tensor(file_name(name), *array.shape))
    source.tensors += [tensor(file_name(f"{name}.weight"), *shape) for name, shape in LINEARS.items()]
    if architecture == "qwen2":
        source.tensors += [tensor(f"blk.0.attn_{part}.bias", LINEARS[_projection(part)][0]) for part in "qkv"]
    if architecture in ("qwen3", "gemma3"):
        source.tensors += [tensor(f"blk.0.attn_{part}_norm.weight", 32) for part in "qk"]
    wide, narrow = (LINEARS[_projection(part)][0] for part in "qk")
    if architecture == "olmo2":
        source.tensors = [each for each in source.tensors if each[0] not in ("blk.0.attn_norm.weight", _MLP_NORM)]
        source.tensors += [tensor("blk.0.attn_q_norm.weight", wide), tensor("blk.0.attn_k_norm.weight", narrow)]
    if architecture == "seed_oss":
        source.tensors = [
            ("blk.0.post_attention_norm.weight", *each[1:]) if each[0] == _MLP_NORM else each for each in source.tensors
        ]
        source.tensors += [tensor(f"blk.0.attn_{part}.bias", LINEARS[_projection(part)][0]) for part in "qkv"]
    if architecture in ("gemma2", "gemma3", "olmo2"):
        hidden = LINEARS[_projection("q")][1]
        source.tensors += [tensor(f"blk.0.post_{part}_norm.weight", hidden) for part in ("attention", "ffw")]
    if architecture in ("gemma", "gemma2"):  # whose head is always the embedding
        source.tensors = [each for each in source.tensors if each[0] != "output.weight"]
    if architecture in (*MIXTURES, "phi3", "glm4"):
        source.tensors = _fused(architecture, source.tensors)
    source.tensors += more
    return source


def _layered(architecture: str, values: dict[str, Any], *more: Tensor) -> GgufSource:
    """A model whose layers differ; `values` win over its own."""
    own = {f"llama.{key}": value for key, value in LAYERED[architecture][1].items()}
    name = architecture.partition(":")[0]
    changed = llama_values() | {"llama.block_count": 4} | own | values
    named = {key.replace("llama.", f"{name}.", 1): value for key, value in changed.items() if value is not None}
    tensors = [tensor(each, *shape) for each, shape in shapes_of(architecture).items()]
    if "rope_freqs.weight" in shapes_of(architecture):
        # A quarter of each head is rotated.
        ((place, size),) = ((at, each[1][0]) for at, each in enumerate(tensors) if each[0] == "rope_freqs.weight")
        factors = np.where(np.arange(size) < size // 4, 1, 1e30).astype(np.float32)
        tensors[place] = ("rope_freqs.weight", (size,), 0, factors.tobytes())
    return GgufSource(named | {"general.architecture": name}, [*tensors, *more])


def _fused(architecture: str, tensors: list[Tensor]) -> list[Tensor]:
    """The tensors of architectures that fuse matrices, or have experts."""
    hidden, inner, wide, narrow = 128, 256, 128, 64

    def without(*parts: str) -> list[Tensor]:
        return [each for each in tensors if each[0].rpartition(".")[0] not in {f"blk.0.{part}" for part in parts}]

    qkv_biases = [
        tensor(f"blk.0.attn_{part}.bias", size) for part, size in zip("qkv", (wide, narrow, narrow), strict=True)
    ]
    up = tensor("blk.0.ffn_up.weight", 2 * inner, hidden)
    if architecture == "phi3":
        qkv = tensor("blk.0.attn_qkv.weight", wide + 2 * narrow, hidden)
        return [*without("attn_q", "attn_k", "attn_v", "ffn_gate", "ffn_up"), qkv, up]
    if architecture == "glm4":
        norms = [tensor(f"blk.0.post_{part}_norm.weight", hidden) for part in ("attention", "ffw")]
        return [*without("ffn_gate", "ffn_up"), up, *qkv_biases, *norms]
    size = inner if architecture == "olmoe" else EXPERT_SIZE
    shapes = {"gate": (size, hidden), "up": (size, hidden), "down": (hidden, size)}
    found = without("ffn_gate", "ffn_up", "ffn_down")
    found += [tensor(f"blk.0.ffn_{part}_exps.weight", EXPERTS, *shape) for part, shape in shapes.items()]
    found.append(tensor("blk.0.ffn_gate_inp.weight", EXPERTS, hidden))
    if architecture in ("qwen3moe", "olmoe"):
        widths = (32, 32)
        if architecture == "olmoe":
            found = [each for each in found if each[0] not in ("blk.0.attn_k.weight", "blk.0.attn_v.weight")]
            found += [tensor(f"blk.0.attn_{part}.weight", wide, hidden) for part in "kv"]
            widths = (wide, wide)
        found += [tensor(f"blk.0.attn_{part}_norm.weight", n) for part, n in zip("qk", widths, strict=True)]
    if architecture == "qwen2moe":
        shared = {"gate": (inner, hidden), "up": (inner, hidden), "down": (hidden, inner)}
        found += [tensor(f"blk.0.ffn_{part}_shexp.weight", *shape) for part, shape in shared.items()]
        found += [*qkv_biases, tensor("blk.0.ffn_gate_inp_shexp.weight", hidden)]
    if architecture == "gpt-oss":
        found = [("blk.0.post_attention_norm.weight", *each[1:]) if each[0] == _MLP_NORM else each for each in found]
        found += [tensor(f"blk.0.ffn_{part}_exps.bias", EXPERTS, shape[0]) for part, shape in shapes.items()]
        found += [*qkv_biases, tensor("blk.0.attn_output.bias", hidden)]
        found += [tensor("blk.0.ffn_gate_inp.bias", EXPERTS), tensor("blk.0.attn_sinks.weight", 4)]
    return found


def _projection(part: str) -> str:
    return next(name for name in LINEARS if name.endswith(f"{part}_proj"))


def config_of(folder: Path, source: GgufSource) -> dict[str, Any]:
    (folder / "model.gguf").write_bytes(source.to_bytes())
    with Checkpoint.open(folder / "model.gguf") as checkpoint:
        return checkpoint.config


def read(folder: Path, source: GgufSource) -> ModelConfig:
    return read_config(Fields(config_of(folder, source), "config.json"))


def scaling(**values: Any) -> dict[str, Any]:
    return {f"llama.rope.scaling.{key}": value for key, value in values.items()}


@pytest.mark.parametrize("architecture", sorted({*ARCHITECTURES, *LAYERED} - {*LATENT, *HYBRIDS}))
def test_a_whole_file_runs(architecture: str, tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(whole(architecture).to_bytes())
    assert why_not_run(tmp_path / "model.gguf") is None


def test_llama_with_experts_is_mixtral(tmp_path: Path) -> None:
    values = {"llama.expert_count": EXPERTS, "llama.expert_used_count": 2}
    source = whole("llama", values)
    source.tensors = [each for each in source.tensors if not each[0].startswith("blk.0.ffn_") or each[0] == _MLP_NORM]
    shapes = {"gate": (256, 128), "up": (256, 128), "down": (128, 256)}
    source.tensors += [tensor(f"blk.0.ffn_{part}_exps.weight", EXPERTS, *shape) for part, shape in shapes.items()]
    source.tensors.append(tensor("blk.0.ffn_gate_inp.weight", EXPERTS, 128))
    assert config_of(tmp_path, source)["model_type"] == "mixtral"
    assert why_not_run(tmp_path / "model.gguf") is None


def test_rows_of_two_tensors_alternate(tmp_path: Path) -> None:
    source = whole("gpt-oss")
    for index, (name, shape, kind, content) in enumerate(source.tensors):
        part = {"ffn_gate_exps": 1, "ffn_up_exps": 2}.get(name.split(".")[2] if name.startswith("blk") else "", 0)
        if part:
            numbers = part * 100 + np.arange(shape[0])[(slice(None), *[None] * (len(shape) - 1))]
            content = np.broadcast_to(numbers, shape).astype(np.float16).tobytes()
        source.tensors[index] = (name, shape, kind, content)
    (tmp_path / "model.gguf").write_bytes(source.to_bytes())
    with Checkpoint.open(tmp_path / "model.gguf") as checkpoint:
        found = checkpoint.read_float32("model.layers.0.mlp.experts.gate_up_proj.2.T")
        assert found.shape == (2 * EXPERT_SIZE, 128)
        assert (found[::2] == 102).all() and (found[1::2] == 202).all()
        biases = checkpoint.read_float32("model.layers.0.mlp.experts.gate_up_proj_bias")
        assert biases.shape == (EXPERTS, 2 * EXPERT_SIZE)
        assert (biases[1, ::2] == 101).all() and (biases[1, 1::2] == 201).all()
        assert (
            config_of(tmp_path, whole("gpt-oss", scaling(type="yarn", factor=4.0)))["rope_parameters"]["truncate"]
            is False
        )


@pytest.mark.parametrize(
    ("more", "dropped", "message"),
    [
        ([], "blk.0.ffn_up_exps.weight", "is there without the layer's 'ffn_up_exps.weight'"),
        ([], "blk.0.ffn_gate_exps.bias", "is there without the layer's 'ffn_gate_exps.bias'"),
        ([tensor("blk.0.ffn_up_exps.weight", EXPERTS, 64, 64)], "blk.0.ffn_up_exps.weight", "differ in type or shape"),
        ([tensor("blk.0.ffn_down_exps.weight", 128, 64)], "blk.0.ffn_down_exps.weight", "expected a stack of experts"),
        (
            [tensor("blk.0.ffn_down_exps.weight", 2, 128, 64)],
            "blk.0.ffn_down_exps.weight",
            r"has 2 experts, and the model 3",
        ),
    ],
)
def test_malformed_experts_are_refused(more: list[Tensor], dropped: str, message: str, tmp_path: Path) -> None:
    source = whole("gpt-oss", None, *more)
    first = next(i for i, each in enumerate(source.tensors) if each[0] == dropped)
    del source.tensors[first]
    with pytest.raises(FormatError, match=message):
        config_of(tmp_path, source)


def test_two_tensors_of_one_name_are_refused(tmp_path: Path) -> None:
    source = whole("gpt-oss", None, tensor("blk.0.ffn_norm.weight", 128))
    message = r"'blk.0.post_attention_norm.weight' and 'blk.0.ffn_norm.weight' are both model.*post_attention_layernorm"
    with pytest.raises(FormatError, match=message):
        config_of(tmp_path, source)


@pytest.mark.parametrize("layer", ["00", "\u0660"])
def test_other_spellings_of_a_layer_are_refused(layer: str, tmp_path: Path) -> None:
    source = whole("llama", None, tensor(f"blk.{layer}.attn_norm.weight", 128))
    with pytest.raises(UnsupportedError, match=f"'blk.{layer}.attn_norm.weight' is not part of"):
        config_of(tmp_path, source)


def test_biases_in_blocks_are_refused(tmp_path: Path) -> None:
    source = whole("gpt-oss")
    source.tensors = [
        (name, shape, 8, bytes(shape[0] * shape[1] // 32 * 34)) if name.endswith("_exps.bias") else (name, shape, *rest)
        for name, shape, *rest in source.tensors
    ]
    with pytest.raises(UnsupportedError, match=r"_exps\.bias' is Q8_0; expected one of .*F32"):
        config_of(tmp_path, source)


def write_random(folder: Path) -> dict[str, np.ndarray]:
    """A GPT-OSS file with experts in 16-bit floats, and its stacks as Hugging Face has them."""
    generator = np.random.default_rng(2)
    source = whole("gpt-oss", {"tokenizer.ggml.pre": "gpt-2"})
    drawn = [generator.standard_normal(shape).astype(np.float16) for _, shape, _, _ in source.tensors]
    source.tensors = [(each[0], each[1], 1, array.tobytes()) for each, array in zip(source.tensors, drawn, strict=True)]
    (folder / "model.gguf").write_bytes(source.to_bytes())
    values = {each[0]: array for each, array in zip(source.tensors, drawn, strict=True)}
    gate, up, down = (values[f"blk.0.ffn_{part}_exps.weight"] for part in ("gate", "up", "down"))
    rows = np.stack([gate, up], axis=2).reshape(EXPERTS, 2 * EXPERT_SIZE, -1)
    return {"gate_up_proj": rows.swapaxes(1, 2), "down_proj": down.swapaxes(1, 2)}


@pytest.mark.parametrize(
    "options",
    [
        CompressOptions(bits=8, measure=False),
        CompressOptions(lossless=True, measure=False),
        CompressOptions(overrides={"*experts*": None}, measure=False),
        CompressOptions(bits=8, overrides={"*.1.T": None}, measure=False),
    ],
    ids=["8 bits", "lossless", "kept", "one kept"],
)
def test_experts_in_floats_are_compressed_and_exported(options: CompressOptions, tmp_path: Path) -> None:
    expected = write_random(tmp_path)
    compress(tmp_path / "model.gguf", tmp_path / "coded", options)
    pool = _core.ThreadPool(1)
    place = "model.layers.0.mlp.experts"
    is_kept = options.overrides == {"*experts*": None}
    with CompressedModel.open(tmp_path / "coded") as model:
        assert (f"{place}.down_proj.2.T" in model.specs) is not is_kept
        export(model, tmp_path / "exported", pool)
        export(model, tmp_path / "wide", pool, "f32")
    with Checkpoint.open(tmp_path / "wide") as wide:
        assert wide.read(f"{place}.down_proj").dtype == (np.float16 if is_kept else np.float32)
    with Checkpoint.open(tmp_path / "exported") as exported:
        assert not any(name.endswith(".T") for name in exported.tensors)
        for name, weights in expected.items():
            found = exported.read(f"{place}.{name}")
            assert found.dtype == np.float16 and found.shape == weights.shape
            limit = 0 if is_kept or options.lossless else 0.03
            np.testing.assert_allclose(found.astype(np.float32), weights.astype(np.float32), atol=limit, rtol=0)
            assert options.bits is None or not options.overrides or (found[1] == weights[1]).all()


def test_gemma3(tmp_path: Path) -> None:
    config = read(
        tmp_path, whole("gemma3", {**scaling(type="linear", factor=8.0), "llama.attention.sliding_window": 16})
    )
    assert config.windows == (16,)
    assert config.ropes[0] is not None
    assert config.ropes[0].frequencies[0] == 1
    assert config.rope.frequencies[0] == 1 / 8
    assert (config.attention_scale, config.embedding_scale) == (32**-0.5, config.hidden_size**0.5)
    with Checkpoint.open(tmp_path / "model.gguf") as checkpoint:
        # The file has the weights of norms plus one, which are zeros here.
        assert (checkpoint.read_float32("model.layers.0.pre_feedforward_layernorm.weight") == -1).all()
    assert read(tmp_path, whole("gemma3")).windows == (None,)


def test_gemma2(tmp_path: Path) -> None:
    values = {"llama.attention.sliding_window": 8, "llama.final_logit_softcapping": 20.0}
    config = read(tmp_path, whole("gemma2", values))
    assert config.windows == (8,)
    assert (config.attention_cap, config.logit_cap) == (50.0, 20.0)


def test_granite(tmp_path: Path) -> None:
    factors = {"attention.scale": 0.25, "embedding_scale": 12.0, "residual_scale": 0.5, "logit_scale": 8.0}
    config = read(tmp_path, whole("granite", {f"llama.{key}": value for key, value in factors.items()}))
    found = (config.attention_scale, config.embedding_scale, config.residual_scale, config.logit_scale)
    assert found == (0.25, 12.0, 0.5, 1 / 8)
    default = read(tmp_path, whole("granite"))
    assert (default.attention_scale, default.embedding_scale, default.logit_scale) == (32**-0.5, 1.0, 1.0)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({}, {"rope_type": "default"}),
        ({"llama.rope.scale_linear": 4.0}, {"rope_type": "linear", "factor": 4.0}),
        (scaling(factor=4.0), {"rope_type": "linear", "factor": 4.0}),
        (scaling(factor=0.0), {"rope_type": "default"}),
        (scaling(type="none", factor=4.0), {"rope_type": "default"}),
        (scaling(type="linear"), {"rope_type": "default"}),
        (scaling(factor=2.0) | {"llama.rope.scale_linear": 4.0}, {"rope_type": "linear", "factor": 2.0}),
        (
            scaling(type="yarn", factor=4.0),
            {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128},
        ),
        (
            scaling(type="yarn", factor=4.0, original_context_length=32, yarn_beta_fast=16.0, yarn_beta_slow=2.0),
            {
                "rope_type": "yarn",
                "factor": 4.0,
                "original_max_position_embeddings": 32,
                "beta_fast": 16.0,
                "beta_slow": 2.0,
            },
        ),
    ],
)
def test_rotations(values: dict[str, Any], expected: dict[str, Any], tmp_path: Path) -> None:
    assert config_of(tmp_path, whole("llama", values))["rope_parameters"] == {"rope_theta": 10000.0, **expected}


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({}, 1 + 0.1 * math.log(4)),
        ({"attn_factor": 0.7}, 0.7 * (1 + 0.1 * math.log(4))),
    ],
)
def test_the_scale_of_yarn(values: dict[str, Any], expected: float, tmp_path: Path) -> None:
    found = read(tmp_path, whole("llama", scaling(type="yarn", factor=4.0, original_context_length=32, **values)))
    assert found.rope.scale == pytest.approx(expected)


@pytest.mark.parametrize("name", sorted(_FIXED))
def test_options_of_other_variants_are_refused(name: str, tmp_path: Path) -> None:
    architecture = "qwen2" if name == "expert_count" else "llama"  # which is Mixtral with experts
    for value in _FIXED[name]:
        config_of(tmp_path, whole(architecture, {f"llama.{name}": value}))
    wrong: Any = "other" if isinstance(_FIXED[name][0], str) else not _FIXED[name][0]
    wrong = wrong if isinstance(_FIXED[name][0], (str, bool)) else 0.3
    with pytest.raises(UnsupportedError, match=rf"{architecture}\.{name} .* is not implemented; it should be"):
        config_of(tmp_path, whole(architecture, {f"llama.{name}": wrong}))


@pytest.mark.parametrize("name", sorted(_INERT))
def test_keys_without_a_bearing_are_passed_over(name: str, tmp_path: Path) -> None:
    assert config_of(tmp_path, whole("llama", {f"llama.{name}": 3})) == config_of(tmp_path, whole())


def test_every_key_has_one_meaning() -> None:
    assert not _USED & _INERT
    assert not (_USED | _INERT) & _FIXED.keys()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"llama.rope.dimension_count": 16}, "rope.dimension_count is 16, expected 32, the heads' length"),
        ({"llama.attention.value_length": 16}, "attention.value_length is 16, expected 32, the keys' length"),
        ({"llama.vocab_size": 7}, "llama.vocab_size is 7, expected 320, the rows of token_embd.weight"),
        ({"llama.attention.sliding_window": 64}, "attention.sliding_window 64 is not implemented"),
        ({"llama.attention.scale": 0.5}, "attention.scale 0.5 is not implemented"),
        ({"llama.attention.head_count_kv": [1, 2]}, "head_count_kv differs between layers"),
        ({"llama.rope.dimension_sections": [4, 4]}, "the key 'llama.rope.dimension_sections' is not known"),
        ({"llama.rope.freq_base_swa": 1.0}, "the key 'llama.rope.freq_base_swa' is not known"),
        ({"llama.ssm.conv_kernel": 4}, "the key 'llama.ssm.conv_kernel' is not known"),
        (scaling(attn_factor=0.7), "rope.scaling.attn_factor 0.69.* is not implemented"),
        ({"general.type": "adapter"}, "general.type 'adapter' is not implemented; it should be 'model'"),
        ({"general.quantization_version": 1}, "general.quantization_version 1 is not implemented"),
        ({"general.sampling.mirostat": 2}, "general.sampling.mirostat 2 is not implemented"),
    ],
)
def test_values_that_are_not_implemented(values: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match=message):
        config_of(tmp_path, whole("llama", values))


@pytest.mark.parametrize(
    "values",
    [
        {"llama.rope.dimension_count": 32},
        {"llama.attention.key_length": 32, "llama.attention.value_length": 32},
        {"llama.vocab_size": 320},
        {"llama.attention.sliding_window": 128},
        {"llama.attention.scale": 32**-0.5},
        {"llama.attention.head_count_kv": [2, 2]},
        {"general.type": "model", "general.quantization_version": 2, "general.name": "x"},
    ],
)
def test_values_that_agree_with_the_rest(values: dict[str, Any], tmp_path: Path) -> None:
    assert config_of(tmp_path, whole("llama", values)) == config_of(tmp_path, whole())


def test_layers_without_end_are_refused(tmp_path: Path) -> None:
    """One number would stand for a list of as many."""
    with pytest.raises(FormatError, match=r"lfm2.block_count is 2147483647, expected at most 10000"):
        config_of(tmp_path, whole("lfm2", {"lfm2.block_count": 2**31 - 1, "lfm2.attention.head_count_kv": 2}))


@pytest.mark.parametrize("bad", [math.nan, math.inf, 0.0])
def test_factors_of_rotations_are_numbers(bad: float, tmp_path: Path) -> None:
    factors = np.array([1.0, bad], np.float32).tobytes()
    parts = [(f"rope_factors_{which}.weight", (2,), 0, factors) for which in ("long", "short")]
    with pytest.raises(FormatError, match=r"rope_factors_long.weight holds a factor that is not positive and finite"):
        config_of(tmp_path, whole("phi3", {"phi3.rope.scaling.original_context_length": 64}, *parts))


def test_tokens_that_are_not_rows_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match=r"tokens has 1 tokens, and token_embd\.weight 320 rows"):
        config_of(tmp_path, whole("llama", {"tokenizer.ggml.tokens": ["a"]}))


def rows(part: str) -> int:
    return LINEARS[_projection(part)][0]


ALL_BIASES = [tensor(f"blk.0.attn_{part}.bias", rows(part)) for part in "qkv"]
ALL_BIASES.append(tensor("blk.0.attn_output.bias", rows("o")))


@pytest.mark.parametrize("architecture", ["llama", "qwen3"])
def test_biases_on_all_projections(architecture: str, tmp_path: Path) -> None:
    config = config_of(tmp_path, whole(architecture, {}, *ALL_BIASES))
    assert config["attention_bias"] is True
    assert why_not_run(tmp_path / "model.gguf") is None


@pytest.mark.parametrize(
    ("architecture", "biases"),
    [
        ("llama", ALL_BIASES[:3]),
        ("llama", ALL_BIASES[:1]),
        ("llama", [*ALL_BIASES, tensor("blk.0.ffn_up.bias", 256)]),
        ("llama", [tensor("output.bias", 320)]),
        ("llama", [tensor("output_norm.bias", 128)]),
        ("qwen2", [ALL_BIASES[3]]),
        ("qwen3", ALL_BIASES[:3]),
        ("qwen3", [tensor("blk.0.ffn_up.bias", 256)]),
    ],
)
def test_other_biases_are_refused(architecture: str, biases: list[Tensor], tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match=r"is a bias that .* does not have, or that other projections"):
        config_of(tmp_path, whole(architecture, {}, *biases))


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (tensor("blk.0.attn_q_norm.weight", 32), "is not part of the architecture llama"),
        (tensor("blk.1.ffn_up.weight", 256, 128), "is beyond the 1 layers of the model"),
        (tensor("blk.0.attn_sub_norm.weight", 128), "is not part of a supported architecture"),
    ],
)
def test_tensors_that_would_not_be_read_are_refused(extra: Tensor, message: str, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match=message):
        config_of(tmp_path, whole("llama", {}, extra))


def long_factors(**values: float) -> list[Tensor]:
    return [
        (f"rope_factors_{name}.weight", (16,), 0, np.full(16, value, np.float32).tobytes())
        for name, value in values.items()
    ]


def test_longrope(tmp_path: Path) -> None:
    values = scaling(original_context_length=64, attn_factor=1.25)
    rope = read(tmp_path, whole("phi3", values, *long_factors(long=8.0, short=2.0))).rope
    assert (rope.switch_length, rope.scale) == (64, 1.25)
    assert rope.long_frequencies is not None
    np.testing.assert_allclose(rope.frequencies[0], 0.5)
    np.testing.assert_allclose(4 * rope.long_frequencies, rope.frequencies, rtol=1e-6)
    for architecture, factors in (("phi3", {"long": 8.0}), ("llama", {"long": 8.0, "short": 2.0})):
        with pytest.raises(UnsupportedError, match=r"are supported together, for the architectures phi3, phimoe"):
            config_of(tmp_path, whole(architecture, values, *long_factors(**factors)))


@pytest.mark.parametrize(
    ("architecture", "values", "message"),
    [
        ("gemma4", {"attention.sliding_window_pattern": [True, False]}, "expected 4 times true or false"),
        ("gemma4", {"feed_forward_length": [256, 256]}, "expected 4 integers from 0"),
        ("lfm2", {"attention.head_count_kv": [0, 0, 0, 0]}, "lfm2.attention.head_count_kv is 0 for all layers"),
        ("glm4moe", {"nextn_predict_layers": 4}, "glm4moe.nextn_predict_layers is 4, of 4 layers in all"),
        ("glm4moe", {"expert_weights_norm": 1}, "expert_weights_norm is 1, expected true or false"),
        ("glm4moe", {"expert_gating_func": 1}, "expert_gating_func is 1, expected 2, sigmoids"),
    ],
)
def test_layers_that_do_not_fit(architecture: str, values: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises((FormatError, UnsupportedError), match=message):
        config_of(tmp_path, whole(architecture, {f"llama.{key}": value for key, value in values.items()}))


def test_factors_of_the_rotation_and_a_scaling_do_not_mix(tmp_path: Path) -> None:
    factors = ("rope_freqs.weight", (16,), 0, np.ones(16, np.float32).tobytes())
    for architecture, values in (("llama", scaling(factor=4.0)), ("qwen2", {})):
        with pytest.raises(UnsupportedError, match=r"rope_freqs\.weight and a scaling of rotations"):
            config_of(tmp_path, whole(architecture, values, factors))


def test_factors_of_the_rotation_of_other_heads_are_refused(tmp_path: Path) -> None:
    factors = ("rope_freqs.weight", (12,), 0, np.ones(12, np.float32).tobytes())
    with pytest.raises(FormatError, match=r"rope_freqs\.weight holds 12 factors, expected 16, one for every two"):
        config_of(tmp_path, whole("llama", None, factors))


def vocabulary(*last: str, **values: Any) -> dict[str, Any]:
    """Metadata of a vocabulary of the model's size that ends with these tokens."""
    tokens = [f"t{number}" for number in range(320 - len(last))] + list(last)
    return {
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.bos_token_id": None,
        "tokenizer.ggml.add_bos_token": None,
        **{f"tokenizer.ggml.{key}": value for key, value in values.items()},
    }


@pytest.mark.parametrize(
    ("values", "bos", "eos"),
    [
        (vocabulary(), None, None),
        (vocabulary(model="llama"), 1, 2),
        (vocabulary(model="llama", bos_token_id=5, eos_token_id=6), 5, 6),
        (vocabulary("<|end_of_text|>", "<|eot_id|>", bos_token_id=3, eos_token_id=318), 3, [318, 319]),
        (vocabulary("<|endoftext|>", "<|im_end|>", eos_token_id=319), None, [319, 318]),
        (vocabulary(eos_token_id=7, eot_token_id=8, eom_token_id=9), None, [7, 8, 9]),
        (vocabulary("<|im_end|>", "<|fim_pad|>", "<|file_sep|>", eos_token_id=317), None, [317, 318, 319]),
        (vocabulary("<|file_sep|>", fim_sep_token_id=4), None, 4),
        (vocabulary("<|return|>", "<|call|>", "<|end|>"), None, [317, 318]),
        (vocabulary("<|end|>"), None, 319),
        (vocabulary("</s>", "<|tool_response>"), None, 319),
    ],
)
def test_start_and_end_tokens(values: dict[str, Any], bos: int | None, eos: Any, tmp_path: Path) -> None:
    config = config_of(tmp_path, whole("llama", values))
    assert (config["bos_token_id"], config["eos_token_id"]) == (bos, eos)
    assert read(tmp_path, whole("llama", values)).bos_token_id == bos


@pytest.mark.parametrize("key", ["bos", "eos", "eot", "fim_pad"])
@pytest.mark.parametrize("value", [320, "x", 1.0])
def test_tokens_that_are_not_there_are_refused(key: str, value: Any, tmp_path: Path) -> None:
    with pytest.raises(FormatError, match=rf"{key}_token_id is .*, expected the number of a token"):
        config_of(tmp_path, whole("llama", vocabulary(**{f"{key}_token_id": value})))


@pytest.mark.parametrize(
    ("values", "begins"),
    [
        ({"pre": "llama-bpe"}, True),
        ({"pre": "llama-bpe", "add_bos_token": False}, False),
        ({"pre": "qwen2"}, False),
        ({"pre": "qwen2", "add_bos_token": True}, True),
        ({"pre": "smollm"}, False),
    ],
)
def test_the_start_token_comes_with_the_kind_of_tokenizer(values: dict[str, Any], begins: bool, tmp_path: Path) -> None:
    named = {f"tokenizer.ggml.{key}": value for key, value in values.items()}
    source = whole("llama", {"tokenizer.ggml.add_bos_token": None, "tokenizer.ggml.merges": [], **named})
    (tmp_path / "model.gguf").write_bytes(source.to_bytes())
    tokenizer = Tokenizer.from_str(convert_tokenizer(tmp_path / "model.gguf")["tokenizer.json"])
    assert tokenizer.encode("1").ids == [1] * begins + [319]


def test_advice_on_sampling_is_carried(tmp_path: Path) -> None:
    def advice(**values: Any) -> Any:
        named = {f"general.sampling.{key}": value for key, value in values.items()}
        source = whole("llama", {"tokenizer.ggml.pre": "gpt-2", "tokenizer.ggml.merges": [], **named})
        (tmp_path / "model.gguf").write_bytes(source.to_bytes())
        files = convert_tokenizer(tmp_path / "model.gguf")
        return json.loads(files["generation_config.json"]) if "generation_config.json" in files else None

    assert advice() is None
    assert advice(temp=0.7, top_p=0.8) == {"do_sample": True, "top_k": 0, "temperature": 0.7, "top_p": 0.8}
    assert advice(temp=0.6, top_k=20, min_p=0.1)["top_k"] == 20
    assert advice(temp=0.0, top_k=20) == {"do_sample": False, "top_k": 20}


def test_named_chat_templates_are_carried(tmp_path: Path) -> None:
    def template(**values: str) -> Any:
        named = {f"tokenizer.{key.replace('_dot_', '.')}": value for key, value in values.items()}
        source = whole("llama", {"tokenizer.ggml.pre": "gpt-2", "tokenizer.ggml.merges": [], **named})
        (tmp_path / "model.gguf").write_bytes(source.to_bytes())
        return json.loads(convert_tokenizer(tmp_path / "model.gguf")["tokenizer_config.json"]).get("chat_template")

    assert template() is None
    assert template(chat_template="a") == "a"
    assert template(chat_template="a", chat_template_dot_tool_use="b") == [
        {"name": "default", "template": "a"},
        {"name": "tool_use", "template": "b"},
    ]
