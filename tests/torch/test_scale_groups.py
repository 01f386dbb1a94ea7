"""Matrices with group scales, which imported checkpoints have, as torch modules."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from entrollm import _core
from entrollm.errors import UnsupportedError
from entrollm.format.group_scales import GroupedKind
from entrollm.format.reader import CompressedModel
from entrollm.matrix import matrix_of
from entrollm.torch import parallel
from entrollm.torch.backend import Backend
from entrollm.torch.entries import to_tensor
from entrollm.torch.weight import CodedWeight
from tests.support.paths import GOLDEN

GROUPS = GOLDEN / "v1-groups"
CPU = torch.device("cpu")


@pytest.mark.parametrize("backend", ["auto", "plain"])
def test_weights_are_those_of_the_folder(backend: Backend) -> None:
    pool = _core.ThreadPool(1)
    with CompressedModel.open(GROUPS) as stored:
        assert any(isinstance(spec.kind, GroupedKind) for spec in stored.specs.values())
        for name, spec in stored.specs.items():
            entries = {suffix: to_tensor(array) for suffix, array in stored.entries(name).items()}
            weight = CodedWeight(name, spec, entries, torch.float32, CPU)
            weight.set_backend(backend)
            expected = matrix_of(stored, name).dequantize(np.arange(spec.rows), pool)
            assert weight.dequantize().numpy().tobytes() == expected.tobytes()
            x = torch.randn(3, spec.columns)
            product = x @ torch.from_numpy(expected).T
            assert torch.allclose(weight(x), product, atol=2e-3 * float(product.abs().max()))
            ids = torch.tensor([spec.rows - 1, 0])
            assert torch.equal(weight.rows(ids), torch.from_numpy(expected)[ids])


def test_they_are_not_split(tmp_path: Path) -> None:
    with CompressedModel.open(GROUPS) as stored:
        name = next(name for name, spec in stored.specs.items() if isinstance(spec.kind, GroupedKind))
        weight = parallel.without_entries(stored, name, torch.float32)
        with pytest.raises(UnsupportedError, match=rf"{name}: matrices with group scales are not split"):
            parallel.PartCutter(stored, 0, 2).fill(weight, 0)
