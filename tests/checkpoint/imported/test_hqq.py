"""HQQ checkpoints keep their integers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from numpy.typing import NDArray

from entrollm import compress, load
from entrollm.errors import FormatError, UnsupportedError
from tests.support.quantized_sources import (
    TOLERANCE,
    Arrays,
    Packer,
    as_float32,
    change_tensors,
    imported_weights,
    write_dense,
    write_source,
)

LAYER = "model.layers.0.mlp.gate_proj."
CONFIG = {"quant_method": "hqq", "quant_config": {}}
TYPES: dict[str, Any] = {"float16": np.float16, "bfloat16": ml_dtypes.bfloat16, "float32": np.float32}


def pack_runs(fields: NDArray[Any], bits: int) -> tuple[str, NDArray[Any]]:
    """Rows of fields; those of the first run are the highest of an element."""
    count = 10 if bits == 3 else 8 // bits
    padded = np.zeros((-(-len(fields) // count) * count, fields.shape[1]), np.int64)
    padded[: len(fields)] = fields
    packed = np.zeros((len(padded) // count, fields.shape[1]), np.int64)
    for run in np.split(padded, count):
        packed = packed * 2**bits + run
    return ("3bit_32", packed.astype(np.int32)) if bits == 3 else (f"{bits}bit_u8", packed.astype(np.uint8))


def text(value: str) -> NDArray[np.uint8]:
    return np.frombuffer(value.encode(), np.uint8)


def packer(bits: int, size: int, compute: str = "float16", stored: Any = None) -> Packer:
    """Packs random integers as hqq does along the rows; its runtime casts scales to the compute type."""

    def pack(generator: np.random.Generator, rows: int, columns: int) -> tuple[Arrays, NDArray[np.float32]]:
        groups = rows * columns // size
        integers = generator.integers(0, 2**bits, (groups, size))
        dtype = TYPES[compute]
        scale = (generator.uniform(0.5, 1.5, (groups, 1)) * 3 / (2**bits * columns**0.5)).astype(stored or dtype)
        zero = generator.uniform(0, 2**bits - 1, (groups, 1)).astype(stored or dtype)
        packing, packed = pack_runs(integers, bits)
        parts: Arrays = {
            "W_q": packed,
            "scale": scale,
            "zero": zero,
            "shape": np.array([rows, columns], np.int64),
            "nbits": np.array(bits, np.int32),
            "group_size": np.array(size, np.int32),
            "axis": np.array(1, np.int32),
            "packing": text(packing),
            "compute_dtype": text(f"torch.{compute}"),
            "unpack_view_dtype": text("torch.uint8"),
            "quant_scale": np.array(0, np.uint8),
            "quant_zero": np.array(0, np.uint8),
            "encoded_state_dict": np.array(1, np.uint8),
        }
        weights = (integers.astype(dtype) - zero.astype(dtype)) * scale.astype(dtype)
        assert weights.dtype == dtype
        return parts, as_float32(weights.reshape(rows, columns))

    return pack


@pytest.mark.parametrize(
    ("bits", "size", "compute", "stored"),
    [
        (1, 64, "float16", None),
        (2, 32, "bfloat16", None),
        (3, 64, "float16", np.float32),
        (4, 64, "float16", None),
        (4, 128, "bfloat16", None),
        (8, 128, "float32", None),
    ],
)
def test_weights_are_exactly_the_sources(bits: int, size: int, compute: str, stored: Any, tmp_path: Path) -> None:
    expected = write_source(tmp_path / "source", CONFIG, packer(bits, size, compute, stored))
    compress(tmp_path / "source", tmp_path / "out")
    found = imported_weights(tmp_path / "out")
    assert found.keys() == expected.keys()
    for name, weights in expected.items():
        np.testing.assert_array_equal(found[name], weights)


def test_the_engine_runs_imported_models(tmp_path: Path) -> None:
    expected = write_source(tmp_path / "source", CONFIG, packer(4, 64))
    compress(tmp_path / "source", tmp_path / "out")
    ids = [5, 300, 17, 17, 9, 211]
    wanted = load(write_dense(tmp_path / "dense", expected)).logits(ids)
    found = load(tmp_path / "out").logits(ids)
    np.testing.assert_allclose(found, wanted, atol=TOLERANCE * float(np.abs(wanted).max()))


@pytest.mark.parametrize(
    ("part", "value", "error", "message"),
    [
        ("axis", np.array(0, np.int32), UnsupportedError, "groups run down the columns; only axis 1"),
        ("axis", None, FormatError, r"axis: expected 1 integer\(s\), found None"),
        (
            "quant_zero",
            np.array(1, np.uint8),
            UnsupportedError,
            "scales that are quantized themselves are not supported",
        ),
        ("shape", np.array([0, 128], np.int64), FormatError, "0 x 128 is not the shape of a matrix"),
        ("shape", np.array([1, 2, 3], np.int64), FormatError, r"expected 2 integer\(s\)"),
        ("group_size", np.array(48, np.int32), UnsupportedError, "groups of 48 do not divide the 128 columns"),
        ("group_size", np.array(-1, np.int32), UnsupportedError, "groups of -1 do not divide"),
        ("packing", text("5bit_u8"), UnsupportedError, "'5bit_u8' with compute_dtype"),
        ("compute_dtype", np.zeros(99, np.uint8), FormatError, "expected a short text as bytes"),
        ("W_q", np.zeros((255, 64), np.uint8), FormatError, "expected 256 x 64 elements for 512 groups of 4 bits"),
        ("scale", np.ones((511, 1), np.float16), FormatError, r"expected shape \[512, 1\]"),
        ("scale", np.full((512, 1), 1e9, np.float32), FormatError, "it has a value that F16 cannot hold"),
    ],
)
def test_malformed_layers_are_refused(part: str, value: Any, error: type, message: str, tmp_path: Path) -> None:
    write_source(tmp_path / "source", CONFIG, packer(4, 64))
    change_tensors(
        tmp_path / "source", lambda t: t.pop(LAYER + part) if value is None else t.update({LAYER + part: value})
    )
    with pytest.raises(error, match=message):
        compress(tmp_path / "source", tmp_path / "out")
