"""AWQ checkpoints keep their integers."""

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
    as_float32,
    change_tensors,
    imported_weights,
    random_scales,
    write_dense,
    write_source,
)

LAYER = "model.layers.0.self_attn.k_proj."
CONFIG = {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm", "zero_point": True}


def pack_words(values: NDArray[Any]) -> NDArray[np.int32]:
    """Eight numbers of a row to a word; the field at bit 4 * i has the output of this order."""
    words = np.zeros((values.shape[0], values.shape[1] // 8), np.uint32)
    for i, output in enumerate((0, 2, 4, 6, 1, 3, 5, 7)):
        words |= values[:, output::8].astype(np.uint32) << np.uint32(4 * i)
    return words.view(np.int32)


def pack(generator: np.random.Generator, rows: int, columns: int) -> tuple[Arrays, NDArray[np.float32]]:
    """Packs random integers as AutoAWQ does, in groups of 32."""
    integers = generator.integers(0, 16, (columns, rows))
    zeros = generator.integers(0, 16, (columns // 32, rows))
    scales = random_scales(generator, zeros.shape, 4, columns)
    group = np.arange(columns) // 32
    weights = (integers - zeros[group]).astype(np.float16) * scales[group]
    return {"qweight": pack_words(integers), "qzeros": pack_words(zeros), "scales": scales}, as_float32(weights.T)


def test_weights_are_exactly_the_sources(tmp_path: Path) -> None:
    expected = write_source(tmp_path / "source", CONFIG, pack)
    result = compress(tmp_path / "source", tmp_path / "out")
    for name, weights in imported_weights(tmp_path / "out").items():
        np.testing.assert_array_equal(weights, expected[name])
    assert result.imported is not None and result.imported.source_bits == 4 + 20 / 32

    ids = [5, 300, 17, 17, 9, 211]
    wanted = load(write_dense(tmp_path / "dense", expected)).logits(ids)
    found = load(tmp_path / "out").logits(ids)
    np.testing.assert_allclose(found, wanted, atol=TOLERANCE * float(np.abs(wanted).max()))


@pytest.mark.parametrize(
    ("part", "value", "message"),
    [
        ("qweight", np.zeros((0, 8), np.int32), r"expected a matrix of type I32, found I32 \[0, 8\]"),
        ("qzeros", np.zeros((4, 7), np.int32), "7 words in each row, expected 8"),
        ("qzeros", np.zeros((3, 8), np.int32), "128 columns do not make 3 groups of one size"),
        ("scales", np.zeros((4, 63), np.float16), r"expected shape \[4, 64\]"),
    ],
)
def test_malformed_layers_are_refused(part: str, value: Any, message: str, tmp_path: Path) -> None:
    write_source(tmp_path / "source", CONFIG, pack)
    change_tensors(tmp_path / "source", lambda t: t.update({LAYER + part: value}))
    with pytest.raises(FormatError, match=message):
        Checkpoint.open(tmp_path / "source")


@pytest.mark.parametrize(("changes", "message"), [({"version": "GEMV"}, "layout 'GEMV'"), ({"bits": 3}, "bits 3")])
def test_other_variants_are_refused(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    write_source(tmp_path / "source", CONFIG | changes, pack)
    with pytest.raises(UnsupportedError, match=message):
        Checkpoint.open(tmp_path / "source")
