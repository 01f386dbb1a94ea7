"""Stored scales: bfloat16 entries, a zero symbol in place of offsets, and what is refused."""

import dataclasses
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from numpy.typing import NDArray

from entrollm import _core
from entrollm.codec.blocks import choose_blocks
from entrollm.errors import FormatError
from entrollm.format import layout
from entrollm.format.code import Code, Field
from entrollm.format.grid import GridKind
from entrollm.format.reader import CompressedModel
from entrollm.format.spec import TensorSpec
from entrollm.format.stored import store_matrix
from entrollm.format.writer import ShardWriter
from entrollm.matrix import matrix_of

SPEC = TensorSpec(
    rows=2,
    columns=64,
    dtype="F32",
    grid_name="test",
    code=Code(Field(2, (0, 1, 2, 3))),
    blocks=choose_blocks(2, 64),
    kind=GridKind(zero=2),
)
SCALE = np.array([0.5, 3.0], ml_dtypes.bfloat16)
SYMBOLS = np.arange(128, dtype=np.uint8).reshape(2, 64) % 4


def write(folder: Path, spec: TensorSpec, extra: dict[str, NDArray[Any]]) -> CompressedModel:
    dense, _, _ = _core.encode(spec.code.program(), 0, SYMBOLS, spec.blocks.rows, spec.blocks.columns)
    with ShardWriter(folder / "model.safetensors") as writer:
        writer.add_matrix(store_matrix("w", spec, {layout.DENSE: layout.padded_stream([dense]), **extra}))
    version = '{"quantization_config": {"quant_method": "entrollm", "version": 2}}'
    (folder / "config.json").write_text(version)
    return CompressedModel.open(folder)


def test_a_zero_symbol_and_bfloat16_scales_dequantize_exactly(tmp_path: Path) -> None:
    model = write(tmp_path, SPEC, {layout.SCALE: SCALE})
    values = matrix_of(model, "w").dequantize(np.arange(2), _core.ThreadPool(1))
    expected = (SYMBOLS.astype(np.float32) - 2) * SCALE.astype(np.float32)[:, np.newaxis]
    np.testing.assert_array_equal(values, expected)
    assert model.specs["w"].kind == GridKind(zero=2, stored={"scale": "BF16"})
    model.check_checksum("w")


def test_column_scales_may_be_bfloat16(tmp_path: Path) -> None:
    columns = np.linspace(1, 2, 64).astype(ml_dtypes.bfloat16)
    model = write(tmp_path, SPEC, {layout.SCALE: SCALE, layout.COLUMN_SCALE: columns})
    values = matrix_of(model, "w").dequantize(np.arange(2), _core.ThreadPool(1))
    rows = (SYMBOLS.astype(np.float32) - 2) * SCALE.astype(np.float32)[:, np.newaxis]
    np.testing.assert_array_equal(values, rows * columns.astype(np.float32))


def test_a_zero_symbol_beside_offsets_is_refused(tmp_path: Path) -> None:
    model = write(tmp_path, SPEC, {layout.SCALE: SCALE, layout.OFFSET: np.ones(2, np.float32)})
    with pytest.raises(FormatError, match="a zero symbol and stored offsets"):
        matrix_of(model, "w")


def test_scales_of_another_type_are_refused(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="scale is stored as F32 or BF16, not float64"):
        write(tmp_path, SPEC, {layout.SCALE: np.ones(2)})


@pytest.mark.parametrize("zero", ["256", "255.5", "-0.5", "true", '"2"'])
def test_a_zero_that_is_no_symbol_is_refused(zero: str) -> None:
    text = SPEC.to_json().replace('"zero":2', f'"zero":{zero}')
    with pytest.raises(FormatError, match="zero must be 0 to 255"):
        TensorSpec.from_json(text, "w")


def test_a_spec_with_offset_and_zero_is_refused() -> None:
    both = dataclasses.replace(SPEC, kind=GridKind(1.0, 0.5, 2))
    with pytest.raises(FormatError, match="both an offset and a zero"):
        TensorSpec.from_json(both.to_json(), "w")
    assert TensorSpec.from_json(SPEC.to_json(), "w") == SPEC
