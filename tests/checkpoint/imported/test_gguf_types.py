"""Every block type of GGUF dequantizes to what ggml makes of it, and stays so when it is coded."""

from __future__ import annotations

import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from entrollm import CompressOptions, _core, compress, load
from entrollm.checkpoint.imported import gguf as imported_gguf
from entrollm.checkpoint.model_folder import Checkpoint
from entrollm.compress.verify import verify
from entrollm.errors import FormatError
from entrollm.files.gguf import BLOCK_TYPES
from entrollm.format.reader import CompressedModel
from tests.support.gguf_sources import GgufSource, llama_values

TYPES = {kind.name: (number, kind) for number, kind in BLOCK_TYPES.items() if kind.weights > 1}
# Where blocks have 16-bit floats, of which random bytes are made finite.
HALVES: dict[str, tuple[int, ...]] = {
    "Q4_0": (0,), "Q4_1": (0, 2), "Q5_0": (0,), "Q5_1": (0, 2), "Q8_0": (0,), "Q2_K": (80, 82), "Q3_K": (108,),
    "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,), "IQ2_XXS": (0,), "IQ2_XS": (0,), "IQ2_S": (0,), "IQ3_XXS": (0,),
    "IQ3_S": (0,), "IQ1_S": (0,), "IQ1_M": (54,), "IQ4_NL": (0,), "IQ4_XS": (0,), "TQ1_0": (52,), "TQ2_0": (64,),
    "Q8_K": (2,),
}  # fmt: skip
# CRC-32 of the weights of `random_rows`, as gguf 0.19 dequantizes them, without the signs of zeros.
CHECKSUMS = {
    "Q4_0": 0xCEBF044E, "Q4_1": 0x49F4C292, "Q5_0": 0xB7813B6E, "Q5_1": 0xE92738F4, "Q8_0": 0x31D8CD49,
    "Q2_K": 0xC8EBA1CF, "Q3_K": 0xFDEA6D03, "Q4_K": 0x58349901, "Q5_K": 0xEF85B410, "Q6_K": 0xBCCEEEA3,
    "IQ2_XXS": 0xE7774088, "IQ2_XS": 0xB10E8607, "IQ3_XXS": 0xA1B40DC4, "IQ1_S": 0x692FEEF2, "IQ4_NL": 0x2D7554AC,
    "IQ3_S": 0x931A88DA, "IQ2_S": 0x40CA7759, "IQ4_XS": 0xFCE405BA, "IQ1_M": 0xA56C6C60, "TQ1_0": 0x7B4AEF4F,
    "TQ2_0": 0xD5D8F00F, "MXFP4": 0x7ED22278, "NVFP4": 0x8137F334,
}  # fmt: skip
HIDDEN, INNER = 32, 256


class Stored:
    """One tensor."""

    def __init__(self, octets: NDArray[np.uint8]) -> None:
        self.entries: Any = {}
        self._octets = octets

    def array(self, name: str) -> NDArray[np.uint8]:
        return self._octets


def random_rows(kind: str, rows: int = 3, blocks: int = 2) -> NDArray[np.uint8]:
    """Blocks of random bytes: uint8 (rows, bytes of a row)."""
    generator = np.random.default_rng(11)
    octets = generator.integers(0, 256, (rows, blocks, TYPES[kind][1].size_bytes)).astype(np.uint8)
    for at in HALVES.get(kind, ()):
        octets[..., at + 1] &= 0xBF
    if kind == "MXFP4":
        octets[..., 0] = generator.integers(0, 253, (rows, blocks))
    return octets.reshape(rows, -1)


def read(kind: str, octets: NDArray[np.uint8]) -> NDArray[np.float32]:
    found = imported_gguf._read("a", kind, Stored(octets))
    return found.groups.apply(found.symbols.astype(np.float32), slice(None))


@pytest.mark.parametrize("kind", CHECKSUMS)
def test_weights_are_those_of_ggml(kind: str) -> None:
    octets = random_rows(kind)
    weights = read(kind, octets)
    assert zlib.crc32((weights + 0.0).tobytes()) == CHECKSUMS[kind]
    theirs = pytest.importorskip("gguf") if kind == "IQ3_S" else None
    if theirs is not None:
        np.testing.assert_array_equal(weights, theirs.quants.dequantize(octets, theirs.GGMLQuantizationType[kind]))


def test_no_type_is_left_out() -> None:
    assert TYPES.keys() == CHECKSUMS.keys() | {"Q8_K"} == imported_gguf._UNPACK.keys()


def test_q8_k_is_a_float_times_integers() -> None:
    octets = random_rows("Q8_K")
    blocks = octets.reshape(3, 2, -1)
    scale, integers = blocks[..., :4].copy().view(np.float32), blocks[..., 4:260].view(np.int8)
    np.testing.assert_array_equal(read("Q8_K", octets), (scale * integers.astype(np.float32)).reshape(3, -1))


@pytest.mark.parametrize("kind", [kind for kind in HALVES if kind != "Q8_K"])
def test_a_scale_that_is_not_finite_is_refused(kind: str) -> None:
    octets = random_rows(kind)
    octets[:, HALVES[kind][0] + 1] |= 0x7C
    if kind == "IQ1_M":
        octets[:, 53] |= 0xF0  # the next four bits of the same float
    with pytest.raises(FormatError, match="has a value that is not finite"):
        read(kind, octets)


def test_an_exponent_that_is_not_a_number_is_refused() -> None:
    octets = random_rows("MXFP4")
    octets[1, 0] = 255
    with pytest.raises(FormatError, match=r"^a: the exponents of MXFP4 blocks: a scale is not a number"):
        read("MXFP4", octets)


def test_every_type_runs_as_it_is_coded(tmp_path: Path) -> None:
    """A model with a layer for each type."""
    generator = np.random.default_rng(2)
    values = llama_values() | {
        "llama.block_count": len(TYPES), "llama.embedding_length": HIDDEN, "llama.feed_forward_length": INNER,
        "llama.attention.head_count": 2, "llama.attention.head_count_kv": 2, "tokenizer.ggml.pre": "gpt-2",
    }  # fmt: skip
    source = GgufSource(values)

    def add(name: str, *shape: int) -> None:
        weights = np.ones(shape) if len(shape) == 1 else generator.standard_normal(shape) / shape[-1] ** 0.5
        kind = (0, np.float32) if len(shape) == 1 else (1, np.float16)
        source.tensors.append((name, shape, kind[0], weights.astype(kind[1]).tobytes()))

    for name, rows in (("token_embd", 320), ("output", 320)):
        add(f"{name}.weight", rows, HIDDEN)
    add("output_norm.weight", HIDDEN)
    for layer, (name, (number, kind)) in enumerate(TYPES.items()):
        for part in ("attn_q", "attn_k", "attn_v", "attn_output"):
            add(f"blk.{layer}.{part}.weight", HIDDEN, HIDDEN)
        for part in ("ffn_gate", "ffn_up"):
            add(f"blk.{layer}.{part}.weight", INNER, HIDDEN)
        for part in ("attn_norm", "ffn_norm"):
            add(f"blk.{layer}.{part}.weight", HIDDEN)
        octets = random_rows(name, HIDDEN, INNER // kind.weights).reshape(HIDDEN, -1, kind.size_bytes)
        for at in HALVES.get(name, ()):
            octets[..., at + 1] = octets[..., at + 1] & 0x83 | 0x10  # about 0.001
        if name == "MXFP4":
            octets[..., 0] = 118
        if name == "Q8_K":
            octets[..., 3] = 0x38
        source.tensors.append((f"blk.{layer}.ffn_down.weight", (HIDDEN, INNER), number, octets.tobytes()))
    (tmp_path / "model.gguf").write_bytes(source.to_bytes())
    compress(tmp_path / "model.gguf", tmp_path / "out", CompressOptions())
    with CompressedModel.open(tmp_path / "out") as model, Checkpoint.open(tmp_path / "model.gguf") as checkpoint:
        assert len(model.specs) == len(TYPES)
        assert verify(model, _core.ThreadPool(1), checkpoint).compared
    ids = [5, 300, 17, 17, 9, 211]
    wanted = load(tmp_path / "model.gguf").logits(ids)
    assert np.isfinite(wanted).all()
    np.testing.assert_allclose(load(tmp_path / "out").logits(ids), wanted, atol=1e-3 * float(np.abs(wanted).max()))
