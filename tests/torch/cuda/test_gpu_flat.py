"""The kernels for flat matrices against the symbols and float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from entrollm.torch.cuda.flat import FlatPart, pack_flat
from entrollm.torch.cuda.flat_matrix import FlatCudaMatrix
from tests.torch.cuda.gpu_checks import check_in_graph, with_scales

DEVICE = torch.device("cuda", 0)

pytestmark = pytest.mark.usefixtures("gpu")

# (rows, columns, deviation in steps, middle symbol)
CASES = [
    (1, 5, 3.0, 128),
    (33, 384, 0.75, 7),
    (100, 1001, 2.0, 100),
    (257, 2048, 4.0, 128),
    (64, 4096, 12.0, 120),
    (2200, 4096, 0.6, 128),
    (5000, 2048, 1.1, 128),
    (40, 14336, 2.2, 128),
    (17, 11008, 40.0, 128),
    (24, 4100, 0.0, 3),
    (40, 28672, 1.1, 128),
]


def _symbols(rows: int, columns: int, deviation: float, middle: int) -> np.ndarray:
    rng = np.random.default_rng(rows * columns)
    spread = rng.uniform(0.5, 1.5, (rows, 1)) * deviation  # rows of several widths
    return np.clip(np.rint(rng.standard_t(6, (rows, columns)) * spread) + middle, 0, 255).astype(np.uint8)


def _part(symbols: np.ndarray, scaled_columns: bool = False) -> tuple[FlatPart, np.ndarray]:
    """A matrix on the GPU, and the same dense in float64."""
    parts, dense = with_scales(symbols, scaled_columns)
    return pack_flat("tensor", *parts), dense


def _error(found: torch.Tensor, expected: np.ndarray) -> float:
    return float(np.linalg.norm(found.double().cpu().numpy() - expected) / np.linalg.norm(expected))


@pytest.mark.parametrize("case", CASES)
def test_decoding_is_exact(case: tuple[int, int, float, int]) -> None:
    symbols = _symbols(*case)
    matrix = FlatCudaMatrix([pack_flat("tensor", torch.from_numpy(symbols).cuda(), torch.ones(len(symbols)))], DEVICE)
    for dtype in (torch.float32, torch.float16):
        np.testing.assert_array_equal(matrix.dequantize(dtype).cpu().numpy(), symbols)
    ids = np.random.default_rng(0).integers(0, len(symbols), 9)
    np.testing.assert_array_equal(matrix.rows(torch.from_numpy(ids).cuda()).cpu().numpy(), symbols[ids])
    part, dense = _part(symbols, scaled_columns=True)
    assert _error(FlatCudaMatrix([part], DEVICE).dequantize(torch.float32), dense) < 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("batch", [1, 2, 3, 4, 5, 8, 12, 17, 32, 40, 70])
@pytest.mark.parametrize("case", CASES)
def test_products_match_float64(case: tuple[int, int, float, int], batch: int, dtype: torch.dtype) -> None:
    part, dense = _part(_symbols(*case), scaled_columns=case[1] % 2 == 0)
    x = torch.randn(batch, case[1], generator=torch.Generator().manual_seed(0)).to(dtype)
    y = FlatCudaMatrix([part], DEVICE).multiply(x.cuda())
    assert y.dtype == dtype
    limit = {torch.float32: 1e-3, torch.bfloat16: 8e-3, torch.float16: 2e-3}[dtype]
    assert _error(y, x.double().numpy() @ dense.T) < limit


@pytest.mark.parametrize("batch", [1, 6, 24])
@pytest.mark.parametrize("scaled", [False, True])
def test_matrices_side_by_side(batch: int, scaled: bool) -> None:
    shapes = ((700, 0.6), (100, 2.0), (30, 9.0))
    parts = [_part(_symbols(rows, 2048, deviation, 128), scaled and rows == 100) for rows, deviation in shapes]
    matrix = FlatCudaMatrix([part for part, _ in parts], DEVICE)
    x = torch.randn(batch, 2048, generator=torch.Generator().manual_seed(0))
    expected = x.double().numpy() @ np.concatenate([dense for _, dense in parts]).T
    assert _error(matrix.multiply(x.cuda()), expected) < 2e-4  # vectors have 16 bits
    assert matrix.dequantize(torch.float32).shape == (830, 2048)


def test_products_do_not_change_between_runs() -> None:
    matrix = FlatCudaMatrix([_part(_symbols(4096, 4096, 1.1, 128))[0]], DEVICE)
    for batch in (1, 8, 32):
        x = torch.randn(batch, 4096, device="cuda")
        first = matrix.multiply(x)
        for _ in range(100):
            assert torch.equal(matrix.multiply(x), first)


@pytest.mark.parametrize("batch", [1, 9])
def test_a_chain_of_products_in_a_graph(batch: int) -> None:
    """Kernels overlap in a graph; each must still see what the one before it wrote."""
    matrices = [FlatCudaMatrix([_part(_symbols(1024, 1024, 1.0 + i, 128))[0]], DEVICE) for i in range(3)]
    x = torch.randn(batch, 1024, device="cuda")

    def chain() -> torch.Tensor:
        y = x
        for _ in range(20):
            for matrix in matrices:
                y = matrix.multiply(y)
                y = y / y.norm()
        return y

    check_in_graph(chain)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("batch", [1, 9])
def test_a_bad_activation_makes_bad_outputs(bad: float, batch: int) -> None:
    x = torch.randn(batch, 256, device="cuda")
    x[0, 17] = bad
    y = FlatCudaMatrix([_part(_symbols(64, 256, 1.0, 128))[0]], DEVICE).multiply(x)
    assert y[0].isnan().all() and y[1:].isfinite().all()


@pytest.mark.parametrize("batch", [1, 9])
def test_a_patch_in_every_place(batch: int) -> None:
    """Symbols far from all others are patched, whatever lane, step, and row they lie in."""
    symbols = np.full((32, 512), 128, np.uint8)
    symbols[:, ::2] = 129
    symbols[np.arange(32)[:, None], (np.arange(32)[:, None] * 13 + np.arange(5) * 83) % 512] = [[3, 255, 0, 77, 200]]
    part = pack_flat("tensor", torch.from_numpy(symbols).cuda(), torch.ones(32))
    assert part.patches.numel() >= 100
    matrix = FlatCudaMatrix([part], DEVICE)
    np.testing.assert_array_equal(matrix.dequantize(torch.float32).cpu().numpy(), symbols)
    x = torch.rand(batch, 512)  # no sign: sums far from 0, beside which rounding is small
    assert _error(matrix.multiply(x.cuda()), x.double().numpy() @ symbols.T.astype(np.float64)) < 1e-4
