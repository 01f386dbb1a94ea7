"""The kernel that rounds a block of columns gives what operations on arrays give, to the last bit."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from entrollm.quantize.feedback import feed_back
from entrollm.quantize.rounding import BLOCK_COLUMNS, ZERO, Rounding, round_columns
from entrollm.torch.cuda.rounding import ColumnRounding
from entrollm.torch.device import TorchDevice


@pytest.mark.parametrize("rows", [1, 33, 4096])
@pytest.mark.parametrize("columns", [1, 22, BLOCK_COLUMNS])
def test_columns_round_as_operations_on_arrays_do(columns: int, rows: int, gpu: torch.device) -> None:
    generator = torch.Generator().manual_seed(columns * rows)
    whole = torch.randn(100, rows, generator=generator).mul(4).to(gpu)
    reach = torch.randn(columns, 200, generator=generator).mul(0.3).to(gpu)[:, 100 : 100 + columns]
    whole[20] *= 100  # beyond the ends of the grid
    lengths = np.abs(np.arange(256) - ZERO) * 0.7 + 1
    thresholds = torch.from_numpy(Rounding(lengths, 0.1).thresholds).to(gpu)
    block = whole[20 : 20 + columns]
    (expected,) = round_columns(block.clone(), reach, thresholds)
    before = whole.clone()
    (found,) = ColumnRounding(gpu)(block, reach, thresholds)
    assert torch.equal(found, expected)
    assert torch.equal(whole, before)
    assert found.unique().numel() > 1 or rows == 1


def test_blocks_that_are_too_large_are_refused(gpu: torch.device) -> None:
    block = torch.zeros(BLOCK_COLUMNS + 1, 8, device=gpu)
    with pytest.raises(ValueError, match="expected at most 64 columns, found 65"):
        ColumnRounding(gpu)(block, block, block)


def test_a_gpu_without_the_kernel_rounds_alike(gpu: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    device = TorchDevice("cuda")
    weights = torch.randn(70, 150, generator=generator).to(gpu)
    factor = torch.linalg.cholesky(torch.cov(torch.randn(150, 400, generator=generator))).to(gpu)
    steps = torch.rand(70, generator=generator).add(0.5).to(gpu), torch.rand(150, generator=generator).add(0.5).to(gpu)
    found = feed_back(weights, factor, steps, Rounding(), device)
    monkeypatch.setattr(device, "_kernels", {})
    assert torch.equal(feed_back(weights, factor, steps, Rounding(), device), found)
