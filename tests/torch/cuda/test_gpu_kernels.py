"""The CUDA kernels against the symbols and float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from entrollm.torch.cuda.device_matrix import DeviceMatrix, transcode
from entrollm.torch.cuda.matrix import CudaMatrix
from tests.torch.cuda.gpu_checks import check_in_graph, with_scales

DEVICE = torch.device("cuda", 0)

pytestmark = pytest.mark.usefixtures("gpu")

# (rows, columns, deviation in steps, middle symbol)
CASES = [
    (16, 72, 0.5, 100),
    (1, 5, 3.0, 128),
    (33, 384, 0.75, 7),
    (48, 960, 1.1, 128),
    (100, 1001, 2.0, 100),
    (257, 2048, 4.0, 128),
    (64, 4096, 12.0, 120),
    (300, 4096, 1.1, 128),
    (2200, 4096, 0.6, 128),
    (5000, 2048, 1.1, 128),
    (40, 14336, 2.2, 128),
    (17, 11008, 40.0, 128),
    (24, 4100, 0.0, 3),
    (40, 28672, 1.1, 128),
]


def _symbols(rows: int, columns: int, deviation: float, middle: int) -> np.ndarray:
    rng = np.random.default_rng(rows * columns)
    return np.clip(np.rint(rng.standard_t(6, (rows, columns)) * deviation) + middle, 0, 255).astype(np.uint8)


def _matrix(symbols: np.ndarray, scaled_columns: bool = False) -> tuple[DeviceMatrix, np.ndarray]:
    """A matrix on the GPU, and the same dense in float64."""
    parts, dense = with_scales(symbols, scaled_columns)
    return transcode("tensor", *parts), dense


@pytest.mark.parametrize("case", CASES)
def test_decoding_is_exact(case: tuple[int, int, float, int]) -> None:
    symbols = _symbols(*case)
    ones = torch.ones(len(symbols), device="cuda")
    matrix = CudaMatrix([transcode("tensor", torch.from_numpy(symbols).cuda(), ones)], torch.device("cuda", 0))
    np.testing.assert_array_equal(matrix.dequantize(torch.float32).cpu().numpy(), symbols)
    np.testing.assert_array_equal(matrix.dequantize(torch.float16).cpu().numpy(), symbols)
    rng = np.random.default_rng(0)
    ids = rng.integers(0, len(symbols), 9)
    np.testing.assert_array_equal(matrix.rows(torch.from_numpy(ids).cuda()).cpu().numpy(), symbols[ids])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("batch", [1, 2, 3, 5, 8, 9, 40])
@pytest.mark.parametrize("case", CASES)
def test_products_match_float64(case: tuple[int, int, float, int], batch: int, dtype: torch.dtype) -> None:
    part, dense = _matrix(_symbols(*case), scaled_columns=case[1] % 2 == 0)
    x = torch.randn(batch, case[1], generator=torch.Generator().manual_seed(0)).to(dtype)
    expected = x.double().numpy() @ dense.T
    y = CudaMatrix([part], DEVICE).multiply(x.cuda())
    assert y.dtype == dtype
    limit = {torch.float32: 1e-3, torch.bfloat16: 8e-3, torch.float16: 2e-3}[dtype]
    error = np.linalg.norm(y.double().cpu().numpy() - expected) / np.linalg.norm(expected)
    assert error < limit


def test_a_few_rows_that_take_many_bits() -> None:
    """Their chunks are large; the product still fits the shared memory."""
    symbols = _symbols(9000, 2048, 1.0, 128)
    symbols[:40] = _symbols(40, 2048, 30.0, 128)
    part, dense = _matrix(symbols)
    matrix = CudaMatrix([part], DEVICE)
    assert matrix.plan(1).fits
    x = torch.randn(1, 2048)
    error = np.linalg.norm(matrix.multiply(x.cuda()).cpu().numpy() - x.double().numpy() @ dense.T)
    assert error < 1e-3 * np.linalg.norm(x.double().numpy() @ dense.T)


@pytest.mark.parametrize("batch", [1, 2, 4, 8, 12])
def test_many_small_tiles(batch: int) -> None:
    """Warps that pass by others by many tiles wait for the place of their sums."""
    part, dense = _matrix(_symbols(60000, 768, 2.0, 128))
    matrix = CudaMatrix([part], DEVICE)
    x = torch.randn(batch, 768, generator=torch.Generator().manual_seed(0))
    expected = x.double().numpy() @ dense.T
    for _ in range(20):
        error = np.linalg.norm(matrix.multiply(x.cuda()).cpu().numpy() - expected)
        assert error < 1e-3 * np.linalg.norm(expected)


def test_products_do_not_change_between_runs() -> None:
    part, _ = _matrix(_symbols(4096, 4096, 1.1, 128))
    matrix = CudaMatrix([part], DEVICE)
    x = torch.randn(1, 4096, device="cuda")
    first = matrix.multiply(x)
    for _ in range(200):
        assert torch.equal(matrix.multiply(x), first)


def test_matrices_side_by_side() -> None:
    parts = [_matrix(_symbols(rows, 2048, deviation, 128)) for rows, deviation in ((700, 0.6), (100, 2.0), (30, 9.0))]
    matrix = CudaMatrix([part for part, _ in parts], DEVICE)
    x = torch.randn(2, 2048, generator=torch.Generator().manual_seed(0))
    expected = x.double().numpy() @ np.concatenate([dense for _, dense in parts]).T
    error = np.linalg.norm(matrix.multiply(x.cuda()).cpu().numpy() - expected) / np.linalg.norm(expected)
    assert error < 2e-4  # vectors have 16 bits
    assert matrix.dequantize(torch.float32).shape == (830, 2048)


def test_a_chain_of_products_in_a_graph() -> None:
    """Kernels overlap in a graph; each must still see what the one before it wrote."""
    parts = [_matrix(_symbols(1024, 1024, 1.0, 128)) for _ in range(3)]
    matrices = [CudaMatrix([part], DEVICE) for part, _ in parts]
    x = torch.randn(1, 1024, device="cuda")

    def chain() -> torch.Tensor:
        y = x
        for _ in range(20):
            for matrix in matrices:
                y = matrix.multiply(y)
                y = y / y.norm()
        return y

    check_in_graph(chain)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_bad_activation_makes_bad_outputs(bad: float) -> None:
    part, _ = _matrix(_symbols(64, 256, 1.0, 128))
    x = torch.randn(1, 256, device="cuda")
    x[0, 17] = bad
    assert CudaMatrix([part], DEVICE).multiply(x).isnan().all()


def test_zero_and_tiny_activations() -> None:
    part, dense = _matrix(_symbols(64, 256, 1.0, 128))
    matrix = CudaMatrix([part], DEVICE)
    assert matrix.multiply(torch.zeros(1, 256, device="cuda")).abs().max() == 0
    x = torch.randn(1, 256, dtype=torch.float64) * 1e-35
    expected = x.numpy() @ dense.T
    error = np.linalg.norm(matrix.multiply(x.float().cuda()).double().cpu().numpy() - expected)
    assert error < 1e-3 * np.linalg.norm(expected)


def test_a_patch_in_every_place() -> None:
    """Symbols far from all others are patched, whatever lane, step, and row they lie in."""
    symbols = np.full((32, 432), 128, np.uint8)
    symbols[:, ::2] = 129
    symbols[np.arange(32)[:, None], (np.arange(32)[:, None] * 13 + np.arange(5) * 83) % 432] = [[3, 255, 0, 77, 200]]
    ones = torch.ones(32, device="cuda")
    matrix = CudaMatrix([transcode("tensor", torch.from_numpy(symbols).cuda(), ones)], torch.device("cuda", 0))
    np.testing.assert_array_equal(matrix.dequantize(torch.float32).cpu().numpy(), symbols)
    x = torch.randn(1, 432)
    expected = x.double().numpy() @ symbols.T.astype(np.float64)
    np.testing.assert_allclose(
        matrix.multiply(x.cuda()).cpu().numpy(), expected, rtol=0, atol=1e-3 * abs(expected).max()
    )
