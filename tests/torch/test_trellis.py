"""Matrices with a trellis as torch modules: whole, on each back end, and split over processes."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from entrollm import _core
from entrollm.format.reader import CompressedModel
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
