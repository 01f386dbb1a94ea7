"""Matrices with a trellis as torch modules: whole, on each back end, and split over processes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from entrollm import _core
from entrollm.codec.reference import half_steps_of_row
from entrollm.compress.describe import describe
from entrollm.compress.verify import verify
from entrollm.format import layout
from entrollm.format.blocks import Blocks
from entrollm.format.code import Code, Field
from entrollm.format.grid import GridKind
from entrollm.format.reader import CompressedModel
from entrollm.format.spec import TensorSpec
from entrollm.format.stored import store_matrix
from entrollm.format.writer import ShardWriter
from entrollm.matrix import matrix_of
from entrollm.torch.backend import Backend, open_on
from entrollm.torch.entries import to_tensor
from entrollm.torch.native import NativeMatrix, open_native
from entrollm.torch.parallel import PartCutter, without_entries
from tests.support.paths import GOLDEN

TRELLIS = GOLDEN / "v2-trellis"
POOL = _core.ThreadPool(1)


@pytest.mark.parametrize("backend", ["auto", "plain"])
def test_weights_are_those_of_the_folder(backend: Backend) -> None:
    with CompressedModel.open(TRELLIS) as stored:
        for name, spec in stored.specs.items():
            entries = {suffix: to_tensor(array) for suffix, array in stored.entries(name).items()}
            matrix = open_on(name, spec, entries, torch.device("cpu"), backend)
            assert not isinstance(matrix, NativeMatrix) or all(part.is_flat for part in matrix.matrices)
            expected = matrix_of(stored, name).dequantize(np.arange(spec.rows), POOL)
            assert matrix.dequantize(torch.float32).numpy().tobytes() == expected.tobytes()
            x = torch.randn(3, spec.columns)
            product = x @ torch.from_numpy(expected).T
            assert torch.allclose(matrix.multiply(x), product, atol=2e-3 * float(product.abs().max()))


@pytest.mark.parametrize("name", ["rows", "parts", "flat"])
@pytest.mark.parametrize("axis", [0, 1])
def test_parts_have_the_weights_of_the_whole(name: str, axis: int) -> None:
    name += ".weight"
    with CompressedModel.open(TRELLIS) as stored:
        rows, columns = stored.specs[name].rows, stored.specs[name].columns
        weight = without_entries(stored, name, torch.float32)
        weight.anchor = torch.empty(0)
        PartCutter(stored, 1, 2).fill(weight, axis)
        whole = matrix_of(stored, name).dequantize(np.arange(rows), POOL)
        part = open_native(name, weight.spec, weight.entries())
        assert part.spec.has_trellis == (axis == 0)
        expected = whole[-(-rows // 2) :] if axis == 0 else whole[:, -(-columns // 2) :]
        np.testing.assert_array_equal(part.dequantize(np.arange(part.spec.rows), POOL), expected)


def test_symbols_of_another_writer_beyond_127_are_read_checked_and_split(tmp_path: Path) -> None:
    code, shape = Code(Field(2, (63, 64, 200, 255))), (6, 130)
    symbols = np.random.default_rng(0).choice(np.array([63, 64, 200, 255], np.uint8), shape)
    dense, _, _ = _core.encode(code.program(), 0, symbols, 3, 192)
    spec = TensorSpec(*shape, "F32", "foreign", code, Blocks(3, 192), GridKind(scale=0.1, zero=127.5, trellis=True))
    (tmp_path / "config.json").write_text('{"quantization_config": {"quant_method": "entrollm", "version": 2}}')
    with ShardWriter(tmp_path / "model.safetensors") as writer:
        writer.add_matrix(store_matrix("a.weight", spec, {layout.DENSE: layout.padded_stream([dense])}))
    with CompressedModel.open(tmp_path) as stored:
        assert verify(stored, POOL).weights == symbols.size
        (found,) = describe(stored, POOL).tensors
        assert found.symbols == 4 and found.grid == "foreign + trellis"
        expected = (np.array([half_steps_of_row(row) for row in symbols.tolist()]) - 127.5) * np.float32(0.1)
        np.testing.assert_allclose(matrix_of(stored, "a.weight").dequantize(np.arange(6), POOL), expected, atol=2e-6)
        for axis, own in ((0, np.s_[3:]), (1, np.s_[:, 65:])):
            weight = without_entries(stored, "a.weight", torch.float32)
            weight.anchor = torch.empty(0)
            PartCutter(stored, 1, 2).fill(weight, axis)
            part = open_native("a.weight", weight.spec, weight.entries())
            rows = np.arange(part.spec.rows)
            np.testing.assert_allclose(part.dequantize(rows, POOL), expected[own], atol=2e-6)
