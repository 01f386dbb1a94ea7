"""Flat matrices in the GPU's layout, written and read back on the CPU."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from entrollm.errors import UnsupportedError
from entrollm.torch.cuda.flat import pack_flat, stripes_of
from entrollm.torch.cuda.flat_plan import block_groups, flat_plan, launch_vectors
from entrollm.torch.cuda.gpu import typical_gpu
from entrollm.torch.cuda.tuning import FAMILIES, HOPPER, Tuning
from tests.support.flat_layout import unpack_flat


def _symbols(rows: int, columns: int, deviation: float, middle: int, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return np.clip(np.rint(rng.standard_t(3, (rows, columns)) * deviation) + middle, 0, 255).astype(np.uint8)


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 35), st.integers(1, 300), st.floats(0, 60), st.integers(0, 255), st.integers(0, 2**32 - 1))
def test_symbols_survive(rows: int, columns: int, deviation: float, middle: int, seed: int) -> None:
    symbols = _symbols(rows, columns, deviation, middle, seed)
    part = pack_flat("tensor", torch.from_numpy(symbols), torch.ones(rows))
    np.testing.assert_array_equal(unpack_flat(part), symbols)


@pytest.mark.parametrize("bits", range(1, 9))
def test_every_width(bits: int) -> None:
    symbols = np.random.default_rng(bits).integers(0, 1 << bits, (16, 256), np.uint8) + np.uint8(0)
    part = pack_flat("tensor", torch.from_numpy(symbols), torch.ones(16))
    assert part.widths == (bits, bits)
    assert part.data.numel() == 16 * 256 * bits // 8 and part.patches.numel() == 0
    np.testing.assert_array_equal(unpack_flat(part), symbols)


def test_rows_of_unequal_width_lie_apart() -> None:
    narrow, wide = _symbols(32, 256, 0.4, 128, 0), _symbols(16, 256, 20.0, 128, 1)
    symbols = np.concatenate([wide, narrow])
    scale = torch.arange(48, dtype=torch.float32)
    part = pack_flat("tensor", torch.from_numpy(symbols), scale, scale * 2)
    assert part.widths[0] < part.widths[1] and part.tile_ends[part.widths[0] - 1] == 2
    np.testing.assert_array_equal(unpack_flat(part), symbols)
    index, scales, offsets = part.heads[:, :48].reshape(48, 3).T
    np.testing.assert_array_equal(part.positions[index], np.arange(48))
    np.testing.assert_array_equal(scales.contiguous().view(torch.float32), index)
    np.testing.assert_array_equal(offsets.contiguous().view(torch.float32), index * 2)


@pytest.mark.parametrize("tuning", FAMILIES, ids=lambda tuning: tuning.family)
@pytest.mark.parametrize("columns", [256, 4096, 14336, 65535])
def test_plans_fit_shared_memory(tuning: Tuning, columns: int) -> None:
    gpu, stripes = typical_gpu(tuning), stripes_of(columns)
    for batch in (1, 3, 8, 16, 32):
        step = launch_vectors(gpu, stripes, 4, batch)
        plan = flat_plan(gpu, (900, 7), stripes, 4, min(step, batch))
        assert plan.end_bytes <= gpu.block_bytes
        assert plan.vectors >= min(step, batch)
        assert plan.prepared or plan.splits == 1
        # No block, and no warp, has a part without columns.
        assert plan.splits * plan.shares <= stripes


def test_a_few_vectors_with_long_rows_take_several_launches() -> None:
    gpu = typical_gpu(HOPPER)
    assert launch_vectors(gpu, stripes_of(4096), 4, 16) == 16
    assert launch_vectors(gpu, stripes_of(14336), 4, 8) == 4
    assert launch_vectors(gpu, stripes_of(14336), 4, 32) == 32


def test_blocks_are_shared_out_by_size() -> None:
    assert block_groups([100], 132) == [132]
    assert block_groups([300, 100], 132) == [99, 33]
    assert block_groups([1000, 1, 1], 10) == [8, 1, 1]
    assert block_groups([5, 5, 5, 5], 2) == [1, 1, 1, 1]


def test_rows_that_are_too_long() -> None:
    with pytest.raises(UnsupportedError, match="tensor: the GPU kernels take at most 65535 columns, this has 65536"):
        pack_flat("tensor", torch.zeros(1, 65536, dtype=torch.uint8), torch.ones(1))
