"""Lossless bfloat16 matrices in the GPU's layout, written and read back on the CPU."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from entrollm.errors import UnsupportedError
from entrollm.torch.cuda.gpu import typical_gpu
from entrollm.torch.cuda.lossless import LosslessPart, pack_lossless
from entrollm.torch.cuda.lossless_matrix import LosslessCudaMatrix, lossless_plan, most_vectors
from entrollm.torch.cuda.tuning import AMPERE, FAMILIES, HOPPER, Tuning

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def unpack(part: LosslessPart) -> np.ndarray:
    """Read a matrix as the kernels do, lane by lane: uint16 (rows, columns)."""
    tiles, stripes = part.tiles, part.stripes
    pieces = part.data.numpy().view(np.uint32).reshape(tiles, stripes, 11, 32, 4)
    lane = np.arange(32)
    out = np.zeros((tiles, 16, stripes, 256), np.uint32)
    base = part.bases.numpy().astype(np.uint32)[:, None, None] << 7
    for quarter in range(4):
        words = [pieces[:, :, 8 + i // 4, :, i % 4] for i in range(3 * quarter, 3 * quarter + 3)]
        for step in range(4):
            for pair in range(4):
                index = (quarter * 4 + step) * 2 + pair % 2
                stored = pieces[:, :, index // 4, :, index % 4]
                field = step * 4 + pair
                for half in range(2):
                    parts = [word >> np.uint32(16 * half) & np.uint32(0xFFFF) for word in words]
                    if field == 15:
                        exponent = sum((word & 1) << np.uint32(bit) for bit, word in enumerate(parts))
                    else:
                        exponent = parts[field // 5] >> np.uint32(1 + 3 * (field % 5)) & 7
                    byte = stored >> np.uint32(8 * (pair // 2 * 2 + half)) & np.uint32(0xFF)
                    row = lane // 4 + 8 * (pair % 2)
                    column = quarter * 64 + step // 2 * 32 + lane % 4 * 8 + step % 2 * 4 + pair // 2 * 2 + half
                    bits = (byte & 0x80) << np.uint32(8) | byte & 0x7F
                    out[:, row, :, column] = (bits + (exponent << np.uint32(7)) + base).transpose(2, 0, 1)
    weights = out.reshape(tiles * 16, -1)[: part.rows, : part.columns].astype(np.uint16)
    begins, patches = part.patch_begins.numpy(), part.patches.numpy().view(np.uint32)
    for row in range(part.rows):
        of_row = patches[begins[row] : begins[row + 1]]
        assert np.all(np.diff((of_row & 0xFFFF).astype(np.int64)) > 0)
        # The kernel takes this back before it adds the weight.
        np.testing.assert_array_equal(weights[row, of_row & 0xFFFF], part.bases.numpy()[row // 16] << 7)
        weights[row, of_row & 0xFFFF] = of_row >> 16
    assert begins[0] == 0 and np.all(begins[part.rows :] == len(patches))
    return weights


def words_of(bits: np.ndarray) -> torch.Tensor:
    """Bits of bfloat16 weights, uint16, as a tensor."""
    return torch.from_numpy(bits.view(np.int16)).view(torch.bfloat16)


def gaussian(rows: int, columns: int) -> np.ndarray:
    """Bits of weights as trained ones are."""
    weights = np.random.default_rng(rows + columns).normal(0, 0.02, (rows, columns)).astype(np.float32)
    return (weights.view(np.uint32) >> 16).astype(np.uint16)


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 35), st.integers(1, 530), st.booleans(), st.integers(0, 2**32 - 1))
def test_every_bit_survives(rows: int, columns: int, noise: bool, seed: int) -> None:
    bits = gaussian(rows, columns)
    rng = np.random.default_rng(seed)
    at = rng.random(bits.shape) < (1 if noise else 0.02)  # NaNs, infinities, denormals and -0 among them
    bits[at] = rng.integers(0, 1 << 16, at.sum())
    np.testing.assert_array_equal(unpack(pack_lossless("tensor", words_of(bits))), bits)


@pytest.mark.parametrize("bits", [0x0000, 0x8000, 0x7FC1, 0xFF80, 0x0001, 0x3C55])
def test_constant_matrices_need_no_patches(bits: int) -> None:
    stored = np.full((17, 300), bits, np.uint16)
    part = pack_lossless("tensor", words_of(stored))
    assert part.patches.numel() == 0
    np.testing.assert_array_equal(unpack(part), stored)


def test_size() -> None:
    """11 bits a weight, and patches of 32 bits for the 1.3 % of Gaussian weights outside of eight binades."""
    part = pack_lossless("tensor", words_of(gaussian(256, 2048)))
    assert 11.3 < part.size_bytes * 8 / (256 * 2048) < 11.6


def test_rows_of_other_magnitude_have_other_bases() -> None:
    bits = gaussian(48, 256)
    bits[16:32] -= 40 << 7  # 2^-40 of the others
    part = pack_lossless("tensor", words_of(bits))
    assert part.bases[0] == part.bases[2] == part.bases[1] + 40
    np.testing.assert_array_equal(unpack(part), bits)


@pytest.mark.parametrize("tuning", FAMILIES, ids=lambda tuning: tuning.family)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("columns", [64, 2048, 4096, 14336])
def test_plans_fit_shared_memory(tuning: Tuning, dtype: torch.dtype, columns: int) -> None:
    gpu, stripes = typical_gpu(tuning), -(-columns // 256)
    for batch in range(1, most_vectors(dtype) + 1):
        plan = lossless_plan(gpu, 900, stripes, batch, dtype)
        if plan is None:  # then more launches take fewer vectors each
            assert batch > 1 and tuning is not HOPPER
            continue
        assert plan.end_bytes <= gpu.block_bytes
        assert 1 <= plan.panel_stripes <= stripes and plan.group >= 1
        assert plan.panel_stripes in (stripes, *range(plan.warps)) or plan.panel_stripes % plan.warps == 0
    # The largest vocabularies multiply one vector at least.
    assert columns > 4096 or lossless_plan(gpu, 16_000, stripes, 1, dtype) is not None


def test_what_plans_say() -> None:
    gpu = typical_gpu(HOPPER)
    plan = lossless_plan(gpu, 896, 16, 1, torch.bfloat16)
    assert plan is not None and (plan.blocks, plan.group, plan.panel_stripes) == (132, 7, 16)
    large = lossless_plan(gpu, 8016, 16, 8, torch.bfloat16)
    assert large is not None and large.group < 61 and large.panel_stripes == 16
    long = lossless_plan(gpu, 256, 56, 8, torch.bfloat16)
    assert long is not None and long.panel_stripes == 24
    assert lossless_plan(typical_gpu(AMPERE), 200_000, 56, 8, torch.float32) is None


def test_refusals() -> None:
    with pytest.raises(UnsupportedError, match="at most 65535 columns, this has 65536"):
        pack_lossless("tensor", torch.zeros(1, 1 << 16, dtype=torch.bfloat16))
    parts = [pack_lossless("tensor", torch.zeros(2, columns, dtype=torch.bfloat16)) for columns in (4, 8)]
    with pytest.raises(ValueError, match=r"same columns: \[4, 8\]"):
        LosslessCudaMatrix(parts, torch.device("cpu"))
    with pytest.raises(ValueError, match="1 to 4 matrices, not 5"):
        LosslessCudaMatrix(parts[:1] * 5, torch.device("cpu"))
