"""Matrices that files hold in the flat form, as torch modules: whole, on each back end, and split over processes."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from entrollm import _core
from entrollm.format.reader import CompressedModel
from entrollm.matrix import matrix_of
from entrollm.torch.backend import Backend
from entrollm.torch.entries import to_tensor
from entrollm.torch.native import open_native
from entrollm.torch.parallel import PartCutter, without_entries
from entrollm.torch.weight import CodedWeight
from tests.support.paths import GOLDEN

FLAT = GOLDEN / "v2-flat"
POOL = _core.ThreadPool(1)


@pytest.mark.parametrize("backend", ["auto", "plain"])
def test_weights_are_those_of_the_folder(backend: Backend) -> None:
    with CompressedModel.open(FLAT) as stored:
        for name, spec in stored.specs.items():
            entries = {suffix: to_tensor(array) for suffix, array in stored.entries(name).items()}
            weight = CodedWeight(name, spec, entries, torch.float32, torch.device("cpu"))
            weight.set_backend(backend)
            expected = matrix_of(stored, name).dequantize(np.arange(spec.rows), POOL)
            assert weight.dequantize().numpy().tobytes() == expected.tobytes()
            x = torch.randn(3, spec.columns)
            product = x @ torch.from_numpy(expected).T
            assert torch.allclose(weight(x), product, atol=2e-3 * float(product.abs().max()))


@pytest.mark.parametrize("axis", [0, 1])
def test_parts_have_the_weights_of_the_whole(axis: int) -> None:
    name = "widths.weight"
    with CompressedModel.open(FLAT) as stored:
        weight = without_entries(stored, name, torch.float32)
        weight.anchor = torch.empty(0)
        PartCutter(stored, 1, 2).fill(weight, axis)
        whole = matrix_of(stored, name).dequantize(np.arange(14), POOL)
        part = open_native(name, weight.spec, weight.entries())
        expected = whole[7:] if axis == 0 else whole[:, 50:]
        np.testing.assert_array_equal(part.dequantize(np.arange(part.spec.rows), POOL), expected)
