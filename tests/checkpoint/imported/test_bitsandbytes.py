"""8-bit bitsandbytes checkpoints keep their integers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from entrollm import compress, load
from entrollm.checkpoint.model_folder import Checkpoint
from entrollm.errors import FormatError, UnsupportedError
from tests.support.quantized_sources import (
    TOLERANCE,
    Arrays,
    change_tensors,
    imported_weights,
    write_dense,
    write_source,
)

LAYER = "model.layers.0.self_attn.v_proj."
CONFIG = {"quant_method": "bitsandbytes", "load_in_8bit": True, "load_in_4bit": False}


def pack(generator: np.random.Generator, rows: int, columns: int) -> tuple[Arrays, NDArray[np.float32]]:
    """Quantizes random rows by their largest magnitudes."""
    weights = generator.standard_normal((rows, columns)).astype(np.float32) / np.float32(columns**0.5)
    largest = np.abs(weights).max(axis=1).astype(np.float32)
    integers = np.rint(weights * (127 / largest)[:, None]).astype(np.int8)
    parts = {"weight": integers, "SCB": largest, "weight_format": np.array(0, np.uint8)}
    return parts, integers.astype(np.float32) * largest[:, None] * np.float32(7.874015718698502e-3)


def test_weights_are_exactly_the_sources(tmp_path: Path) -> None:
    expected = write_source(tmp_path / "source", CONFIG, pack)
    result = compress(tmp_path / "source", tmp_path / "out")
    for name, weights in imported_weights(tmp_path / "out").items():
        np.testing.assert_array_equal(weights, expected[name])
    # Rows are scaled by their extremes, so most integers are small.
    assert result.imported is not None and result.imported.entropy_bits < 7.6

    ids = [5, 300, 17, 17, 9, 211]
    wanted = load(write_dense(tmp_path / "dense", expected)).logits(ids)
    found = load(tmp_path / "out").logits(ids)
    np.testing.assert_allclose(found, wanted, atol=TOLERANCE * float(np.abs(wanted).max()))


@pytest.mark.parametrize(
    ("part", "value", "error", "message"),
    [
        ("weight", None, FormatError, "the tensor is missing"),
        ("weight", np.zeros((64, 128), np.float16), FormatError, "expected a matrix of type I8, found F16"),
        ("SCB", np.ones(63, np.float32), FormatError, r"expected shape \[64\]"),
        ("SCB", np.ones(64, np.float16), FormatError, "SCB: expected F32, found float16"),
        ("weight_format", np.array(1, np.uint8), UnsupportedError, "only weights in rows, format 0, are supported"),
    ],
)
def test_malformed_layers_are_refused(part: str, value: Any, error: type, message: str, tmp_path: Path) -> None:
    write_source(tmp_path / "source", CONFIG, pack)
    change_tensors(
        tmp_path / "source", lambda t: t.pop(LAYER + part) if value is None else t.update({LAYER + part: value})
    )
    with pytest.raises(error, match=message):
        compress(tmp_path / "source", tmp_path / "out")


def test_four_bits_are_refused(tmp_path: Path) -> None:
    write_source(tmp_path / "source", CONFIG | {"load_in_4bit": True, "load_in_8bit": False}, pack)
    with pytest.raises(UnsupportedError, match="4-bit bitsandbytes weights lie on a grid of uneven steps"):
        Checkpoint.open(tmp_path / "source")
