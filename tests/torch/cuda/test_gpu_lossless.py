"""The CUDA kernels for lossless matrices, bit for bit and against float64."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import entrollm.hf
from entrollm import CompressOptions, compress
from entrollm.torch.backend import join
from entrollm.torch.cuda import LosslessCudaMatrix, open_lossless_cuda
from entrollm.torch.cuda.lossless import pack_lossless
from entrollm.torch.weight import CodedWeight
from tests.support.paths import TINY_LLAMA
from tests.torch.cuda.gpu_checks import check_in_graph
from tests.torch.cuda.test_lossless import DTYPES, gaussian, words_of

DEVICE = torch.device("cuda", 0)
SHAPES = [(16, 256), (1, 5), (33, 576), (300, 1030), (2500, 4096), (40, 14336)]

pytestmark = pytest.mark.usefixtures("gpu")


def made(rows: int, columns: int, odd: float = 0.01) -> tuple[LosslessCudaMatrix, np.ndarray]:
    """A matrix on the GPU with some unusual but finite weights, and its bits."""
    bits = gaussian(rows, columns)
    rng = np.random.default_rng(1)
    at = rng.random(bits.shape) < odd
    bits[at] = rng.integers(0, 0x4000, at.sum()) | rng.integers(0, 2, at.sum()) << 15  # up to 2
    return LosslessCudaMatrix([pack_lossless("tensor", words_of(bits).cuda())], DEVICE), bits


@pytest.mark.parametrize("shape", SHAPES)
def test_decoding_is_exact(shape: tuple[int, int]) -> None:
    matrix, bits = made(*shape)
    noise = np.random.default_rng(0).integers(0, 1 << 16, shape).astype(np.uint16)
    random = LosslessCudaMatrix([pack_lossless("tensor", words_of(noise).cuda())], DEVICE)
    for found, expected in ((matrix, bits), (random, noise)):
        decoded = found.dequantize(torch.bfloat16).cpu().view(torch.int16).numpy().view(np.uint16)
        np.testing.assert_array_equal(decoded, expected)
        words = found.dequantize(torch.float32).cpu().numpy().view(np.uint32)
        np.testing.assert_array_equal(words, expected.astype(np.uint32) << 16)
    assert torch.equal(matrix.dequantize(torch.float16).cpu(), words_of(bits).to(torch.float16))
    ids = torch.tensor([shape[0] - 1, 0, shape[0]])
    rows = matrix.rows(ids.cuda()).cpu()
    assert torch.equal(rows[:2], words_of(bits)[ids[:2]].float())
    assert rows[2].isnan().all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_products_match_float64(shape: tuple[int, int], dtype: torch.dtype) -> None:
    matrix, bits = made(*shape)
    weights = words_of(bits).double().numpy()
    limit = {torch.float32: 1e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}[dtype]
    for batch in (1, 2, 3, 8, 11, 30):
        x = torch.randn(batch, shape[1], generator=torch.Generator().manual_seed(0)).to(dtype)
        y = matrix.multiply(x.cuda())
        assert y.dtype == dtype and y.shape == (batch, shape[0])
        # Of what such products are on average, since the one output of a single row may be near 0.
        size = np.linalg.norm(weights) * batch**0.5
        assert np.linalg.norm(y.double().cpu().numpy() - x.double().numpy() @ weights.T) < limit * size
        if batch < 30:
            assert torch.equal(matrix.multiply(x.cuda()), y)


def test_joined_matrices_multiply_in_one_launch() -> None:
    singles = [made(rows, 1024)[0] for rows in (512, 40, 100)]
    joined = join(singles)
    assert isinstance(joined, LosslessCudaMatrix)
    x = torch.randn(2, 1024, device="cuda")
    assert torch.equal(joined.multiply(x), torch.cat([matrix.multiply(x) for matrix in singles], 1))
    assert torch.equal(joined.dequantize(torch.float32), torch.cat([m.dequantize(torch.float32) for m in singles]))


def test_values_that_are_not_finite_reach_their_rows_alone() -> None:
    bits = gaussian(64, 512)
    bits[3, 7], bits[20, 511], bits[40, 0] = 0x7F80, 0xFF80, 0x7FC0
    matrix = LosslessCudaMatrix([pack_lossless("tensor", words_of(bits).cuda())], DEVICE)
    y = matrix.multiply(torch.ones(1, 512, device="cuda"))[0].cpu()
    assert y[3] == torch.inf and y[20] == -torch.inf and y[40].isnan()
    assert int(y.isfinite().sum()) == 61


def test_a_product_waits_for_what_came_before() -> None:
    """Kernels overlap in a graph; each must still see what the one before it wrote."""
    matrices = [made(1024, 1024)[0] for _ in range(2)]
    x = torch.randn(1, 1024, device="cuda")

    def chain() -> torch.Tensor:
        y = x
        for _ in range(20):
            for matrix in matrices:
                y = matrix.multiply(y)
            y = y / y.norm()
        return y

    check_in_graph(chain)


def test_matrices_that_would_not_be_smaller_stay_words() -> None:
    noise = np.random.default_rng(0).integers(0, 1 << 16, (64, 512)).astype(np.uint16)
    for bits in (noise, gaussian(64, 100), gaussian(1, 1 << 16)):
        assert open_lossless_cuda("tensor", words_of(bits).cuda(), DEVICE) is None
    assert open_lossless_cuda("tensor", words_of(gaussian(64, 512)).cuda(), torch.device("cuda")) is not None


def test_a_model_answers_as_on_the_cpu(tmp_path: Path) -> None:
    compress(TINY_LLAMA, tmp_path, CompressOptions(lossless=True))
    tokens = torch.arange(5, 17)[None]
    answers = []
    for device in ("cpu", "cuda"):
        model = entrollm.hf.load(tmp_path, dtype=torch.float32, device=device)
        there = tokens.to(device)
        found = model.generate(there, attention_mask=torch.ones_like(there), max_new_tokens=16, do_sample=False)
        answers.append(found.cpu())
        kinds = {type(module.matrix()) for module in model.modules() if isinstance(module, CodedWeight)}
        assert (LosslessCudaMatrix in kinds) == (device == "cuda")
    assert torch.equal(*answers)
