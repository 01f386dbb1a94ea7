"""Matrices with group scales, which imported checkpoints have, as torch modules."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from entrollm import _core
from entrollm.container.reader import CompressedModel
from entrollm.errors import UnsupportedError
from entrollm.hf import CodedWeight, parallel
from entrollm.hf.backend import Backend, to_tensor

GOLDEN = Path(__file__).parents[1] / "golden" / "v1-groups"
CPU = torch.device("cpu")


@pytest.mark.parametrize("backend", ["auto", "plain"])
def test_weights_are_those_of_the_folder(backend: Backend) -> None:
    pool = _core.ThreadPool(1)
    with CompressedModel.open(GOLDEN) as stored:
        assert any(spec.groups for spec in stored.specs.values())
        for name, spec in stored.specs.items():
            entries = {suffix: to_tensor(array) for suffix, array in stored.stored_arrays(name).items()}
            weight = CodedWeight(name, spec, entries, torch.float32, CPU)
            weight.set_backend(backend)
            expected = stored.matrix(name).dequantize(np.arange(spec.rows), pool)
            assert weight.dequantize().numpy().tobytes() == expected.tobytes()
            x = torch.randn(3, spec.columns)
            product = x @ torch.from_numpy(expected).T
            assert torch.allclose(weight(x), product, atol=2e-3 * float(product.abs().max()))
            ids = torch.tensor([spec.rows - 1, 0])
            assert torch.equal(weight.rows(ids), torch.from_numpy(expected)[ids])


def test_they_are_not_split(tmp_path: Path) -> None:
    with CompressedModel.open(GOLDEN) as stored:
        name = next(name for name, spec in stored.specs.items() if spec.groups)
        weight = parallel.without_entries(stored, name, torch.float32)
        with pytest.raises(UnsupportedError, match=rf"{name}: matrices with group scales are not split"):
            parallel._Cutter(stored, 0, 2).fill(weight, "colwise")
