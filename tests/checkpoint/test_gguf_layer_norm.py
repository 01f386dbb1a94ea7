"""GGUF files of architectures with LayerNorm: tensors in Hugging Face's order, and logits equal to transformers'."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import transformers

import entrollm.hf  # noqa: F401 (registers the format)
from entrollm import CompressOptions, _core, compress
from entrollm.checkpoint.model_folder import Checkpoint
from entrollm.compress.export import export
from entrollm.engine.load import load
from entrollm.errors import EntroLLMError, FormatError, UnsupportedError
from entrollm.format.reader import CompressedModel
from tests.checkpoint.gguf_layer_norms import CENTERED, HEAD, HIDDEN, NARROW, WIDE
from tests.checkpoint.gguf_random import random_model
from tests.checkpoint.test_gguf_metadata import config_of, long_factors, tensor, whole
from tests.checkpoint.test_gguf_tokenizer import merges_of, trained, values_of
from tests.engine.architectures import load_reference, reference_logits
from tests.support.gguf_sources import BLOCKS, TYPE_NUMBERS, GgufSource

TOLERANCE = 2e-3


def source_of(architecture: str, values: dict[str, Any] | None = None) -> tuple[GgufSource, int]:
    """A random model with a tokenizer that can be converted, and the rows of its embedding."""
    original = trained("gpt-2")
    named = values_of(original, "gpt2", pre="gpt-2", merges=merges_of(original)) | (values or {})
    rows = len(named["tokenizer.ggml.tokens"])
    return random_model(named, rows, architecture), rows


def arrays_of(source: GgufSource) -> dict[str, np.ndarray]:
    return {name: np.frombuffer(content, np.float32).reshape(shape) for name, shape, _, content in source.tensors}


def check_reference(source: GgufSource, rows: int, folder: Path, options: CompressOptions) -> None:
    """Compress, run and export a file, and compare its logits with those of transformers."""
    (folder / "model.gguf").write_bytes(source.to_bytes())
    compress(folder / "model.gguf", folder / "coded", options)
    with CompressedModel.open(folder / "coded") as model:
        export(model, folder / "exported", _core.ThreadPool(1), "f32")
    ids = np.random.default_rng(9).integers(5, rows, 24).tolist()
    expected = reference_logits(load_reference(folder / "exported"), ids)
    assert np.abs(load(folder / "coded", 1).logits(ids) - expected).max() < TOLERANCE


@pytest.mark.parametrize("architecture", [*sorted(CENTERED.keys() - {"phi2:fused", "phimoe"}), "granitemoe:shared"])
def test_logits_are_those_of_transformers(architecture: str, tmp_path: Path) -> None:
    source, rows = source_of(architecture)
    check_reference(source, rows, tmp_path, CompressOptions(bits=8, measure=False))


def test_phimoe_with_factors_for_long_texts(tmp_path: Path) -> None:
    scaling = {"original_context_length": 64, "attn_factor": 1.25}
    source, rows = source_of("phimoe", {f"llama.rope.scaling.{key}": value for key, value in scaling.items()})
    source.tensors += [(n, s, 0, np.full(s, 2.0, np.float32).tobytes()) for n, s, *_ in long_factors(long=8, short=2)]
    check_reference(source, rows, tmp_path, CompressOptions(bits=8, measure=False))


@pytest.mark.parametrize("is_kept", [False, True])
def test_blocks_of_gpt2_keep_their_values(is_kept: bool, tmp_path: Path) -> None:
    """The model's matrices are the transposes of the file's, along whose rows its scales are."""
    source, rows = source_of("gpt2")
    generator = np.random.default_rng(6)
    size, pack = BLOCKS["Q8_0"]
    expected = {}
    for index, (name, shape, _, content) in enumerate(source.tensors):
        if name.startswith("blk.0.") and len(shape) == 2:
            blocks = [pack(generator) for _ in range(shape[0] * shape[1] // size)]
            expected[name] = np.array([block[1] for block in blocks], np.float32).reshape(shape)
            content = b"".join(block[0] for block in blocks)
            source.tensors[index] = (name, shape, TYPE_NUMBERS["Q8_0"], content)
    options = CompressOptions(overrides={} if is_kept else {"*.h.1.*": 8}, measure=False)
    check_reference(source, rows, tmp_path, options)
    with Checkpoint.open(tmp_path / "exported") as exported:
        assert not any(name.endswith(".T") for name in exported.tensors)
        for name, part in (("attn_qkv", "attn.c_attn"), ("ffn_down", "mlp.c_proj")):
            found = exported.read(f"transformer.h.0.{part}.weight")
            np.testing.assert_array_equal(found, expected[f"blk.0.{name}.weight"].T)
        kept = exported.read("transformer.h.1.mlp.c_fc.weight")
        difference = np.abs(kept - arrays_of(source_of("gpt2")[0])["blk.1.ffn_up.weight"].T).max()
        assert difference == 0 if is_kept else 0 < difference < 0.01


def test_transposed_matrices_are_refused_where_they_do_not_run(tmp_path: Path) -> None:
    source, _ = source_of("gpt2")
    (tmp_path / "model.gguf").write_bytes(source.to_bytes())
    compress(tmp_path / "model.gguf", tmp_path / "coded", CompressOptions(bits=8, measure=False))
    with pytest.raises(UnsupportedError, match=r"weight\.T is the transpose of the matrix that transformers has"):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "coded")


def read(folder: Path, source: GgufSource, *names: str) -> list[np.ndarray]:
    (folder / "model.gguf").write_bytes(source.to_bytes())
    with Checkpoint.open(folder / "model.gguf") as checkpoint:
        return [checkpoint.read_float32(name) for name in names]


def test_fused_rows_come_by_head(tmp_path: Path) -> None:
    source, _ = source_of("gptneox")
    theirs = arrays_of(source)
    for kind in ("weight", "bias"):
        (found,) = read(tmp_path, source, f"gpt_neox.layers.2.attention.query_key_value.{kind}")
        by_part = theirs[f"blk.2.attn_qkv.{kind}"]
        for head in range(WIDE // HEAD):
            for part in range(3):
                begin = (3 * head + part) * HEAD
                expected = by_part[part * WIDE + head * HEAD :][:HEAD]
                np.testing.assert_array_equal(found[begin : begin + HEAD], expected)


def test_fused_rows_are_split(tmp_path: Path) -> None:
    source, _ = source_of("phi2:fused")
    theirs = arrays_of(source)
    for kind in ("weight", "bias"):
        names = [f"model.layers.1.self_attn.{part}_proj.{kind}" for part in "qkv"]
        found = read(tmp_path, source, *names)
        assert [len(part) for part in found] == [WIDE, NARROW, NARROW]
        np.testing.assert_array_equal(np.concatenate(found), theirs[f"blk.1.attn_qkv.{kind}"])


def test_weights_of_nemotrons_norms_are_less_by_one(tmp_path: Path) -> None:
    source, _ = source_of("nemotron")
    weight, bias = read(tmp_path, source, "model.norm.weight", "model.norm.bias")
    np.testing.assert_allclose(weight, arrays_of(source)["output_norm.weight"] - 1, atol=1e-6)
    np.testing.assert_array_equal(bias, arrays_of(source)["output_norm.bias"])


def test_shared_gates_lie_before_the_rest(tmp_path: Path) -> None:
    source, _ = source_of("granitemoe:shared")
    theirs = arrays_of(source)
    (found,) = read(tmp_path, source, "model.layers.3.shared_mlp.input_linear.weight")
    parts = [theirs[f"blk.3.ffn_{part}_shexp.weight"] for part in ("gate", "up")]
    np.testing.assert_array_equal(found, np.concatenate(parts))


@pytest.mark.parametrize(
    ("architecture", "values", "error", "message"),
    [
        ("gpt2", {"attention.head_count_kv": 2}, UnsupportedError, "head_count_kv is 2, expected 4, the heads"),
        ("gptneox", {"attention.key_length": 64}, UnsupportedError, "key_length is 64, expected 32, the features"),
        ("gptneox", {"use_parallel_residual": 1}, FormatError, "use_parallel_residual is 1, expected true or false"),
        ("stablelm", {"attention.key_length": 64}, UnsupportedError, "key_length is 64, expected 32, the features"),
        (
            "phi2:fused",
            {"attention.head_count_kv": 4},
            FormatError,
            r"shape \[256, 128\], expected 384 rows",
        ),
        ("granitemoe", {"rope.scaling.finetuned": False}, UnsupportedError, "finetuned False is not implemented"),
        ("phimoe", {"attention.sliding_window": 64}, UnsupportedError, "sliding_window 64 is not implemented"),
    ],
)
def test_other_values_are_refused(
    architecture: str, values: dict[str, Any], error: type[EntroLLMError], message: str, tmp_path: Path
) -> None:
    with pytest.raises(error, match=message):
        config_of(tmp_path, whole(architecture, {f"llama.{key}": value for key, value in values.items()}))


@pytest.mark.parametrize(
    ("architecture", "name", "message"),
    [
        ("stablelm", "blk.0.attn_q_norm.weight", "is not part of the architecture stablelm"),
        ("gpt2", "blk.0.ffn_gate.bias", "is a bias that gpt2 does not have"),
        ("gpt2", "blk.4.attn_norm.weight", "is beyond the 4 layers of the model"),
        ("nemotron", "output.bias", "is a bias that nemotron does not have"),
        ("llama", "output_norm.bias", "is a bias that llama does not have"),
        ("phi2", "position_embd.weight", "is not part of a supported architecture"),
    ],
)
def test_other_tensors_are_refused(architecture: str, name: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match=message):
        config_of(tmp_path, whole(architecture, None, tensor(name, HIDDEN)))


def test_a_missing_norm_bias_is_named(tmp_path: Path) -> None:
    source = whole("gptneox")
    source.tensors = [each for each in source.tensors if each[0] != "blk.2.ffn_norm.bias"]
    (tmp_path / "model.gguf").write_bytes(source.to_bytes())
    with pytest.raises(FormatError, match=r"layers\.2\.post_attention_layernorm\.bias: the tensor is missing"):
        load(tmp_path / "model.gguf", 1)
