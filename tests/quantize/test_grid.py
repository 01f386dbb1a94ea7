"""Grids that suit their code: less is wasted at equal distortion, and 0 stays where it has to."""

from __future__ import annotations

import functools

import numpy as np
import pytest
from numpy.typing import NDArray

from entrollm.codec.choose import choose_code
from entrollm.codec.huffman import huffman_bits
from entrollm.format.log_scales import octave_codes
from entrollm.quantize.ecsq import EcsqQuantizer
from entrollm.quantize.grid import Grid, fit_grid, grid_choices
from entrollm.quantize.method import ArraySource
from entrollm.quantize.rounding import ZERO, Rounding
from tests.support.matrices import scale_values

choose = functools.partial(choose_code, blocks=16)
FREE = grid_choices(fits="prefix", keeps_zero=False)
HELD = grid_choices(fits="prefix", keeps_zero=True)
FIXED = grid_choices(fits="none", keeps_zero=False)
PRICE = 0.07


def gaussian(seed: int = 0) -> NDArray[np.float32]:
    return np.random.default_rng(seed).standard_normal(1 << 17).astype(np.float32)


def cost(sample: NDArray[np.float32], grid: Grid) -> float:
    """Bits at equal distortion: those of a Huffman code, and half a bit for each factor of 2 in squared error."""
    symbols = Rounding(grid.lengths, PRICE, grid.shift).symbols(sample / np.float32(grid.stretch))
    values = (symbols - grid.zero) * grid.stretch * grid.gain
    counts = np.bincount(symbols, minlength=256).tolist()
    return huffman_bits(counts) + 0.5 * float(np.log2(np.mean((values - sample) ** 2)))


@pytest.mark.parametrize("step", [0.5, 0.6, 0.85, 1.1])
def test_a_fitted_grid_wastes_less(step: float) -> None:
    fitted, held, fixed = (cost(gaussian(1) / step, fit_grid(gaussian() / step, PRICE, c)) for c in (FREE, HELD, FIXED))
    assert fitted < fixed - 0.008
    assert fitted <= held + 1e-3 and held <= fixed + 1e-3


def test_errors_have_no_mean_on_a_shifted_grid() -> None:
    sample = gaussian() / np.float32(0.85)
    grid = fit_grid(sample, PRICE, FREE)
    assert grid.shift > 0
    symbols = Rounding(grid.lengths, PRICE, grid.shift).symbols(sample / np.float32(grid.stretch))
    errors = (symbols - grid.zero) * grid.stretch * grid.gain - sample
    assert abs(errors.mean()) < 2e-3


def test_zero_stays_where_weights_are_zero() -> None:
    sample = gaussian() / np.float32(0.85)
    sample[::2] = 0
    grid = fit_grid(sample, PRICE, FREE)
    assert (grid.shift, grid.zero) == (0, ZERO)
    assert fit_grid(sample, PRICE, HELD).zero == fit_grid(sample, PRICE, FIXED).zero == ZERO


def test_rounding_to_a_shifted_grid() -> None:
    rounding = Rounding(shift=0.25)
    assert rounding.symbols(np.array([0.25, 0.7, 0.8, -0.3, -1.0], np.float32)).tolist() == [128, 128, 129, 127, 127]


def test_a_row_of_zeros_that_no_sample_sees_stays_zero() -> None:
    weights = np.random.default_rng(3).standard_normal((1024, 512)).astype(np.float32)
    weights[701] = 0
    quantized = EcsqQuantizer(0.85).quantize(ArraySource("w", weights), choose)
    assert quantized.zero == ZERO
    assert (quantized.symbols[701] == ZERO).all()


def test_a_grid_that_may_not_move_does_not() -> None:
    weights = np.random.default_rng(3).standard_normal((64, 512)).astype(np.float32)
    assert EcsqQuantizer(0.85, fits="none").quantize(ArraySource("w", weights), choose).zero == ZERO
    assert EcsqQuantizer(0.85).quantize(ArraySource("w", weights), choose).zero != ZERO


def test_longer_rows_and_finer_steps_get_finer_scales() -> None:
    assert [octave_codes(n, 0.6) for n in (64, 384, 2048, 8192)] == [8, 32, 64, 64]
    assert [octave_codes(384, step) for step in (2.0, 0.6, 0.1)] == [8, 32, 64]


def test_rows_of_very_different_sizes_keep_one_grid_of_scales() -> None:
    """More octaves than bytes can name at the finest spacing; scales that a fit moves stay on the grid."""
    weights = np.random.default_rng(5).standard_normal((64, 512)).astype(np.float32)
    weights *= np.exp2(np.linspace(-12, 12, 64, dtype=np.float32))[:, np.newaxis]
    quantized = EcsqQuantizer(0.6).quantize(ArraySource("w", weights), choose)
    values = (quantized.symbols - np.float64(quantized.zero or 0)) * scale_values(quantized.scale)[:, np.newaxis]
    assert quantized.error == pytest.approx(float(((values - weights) ** 2).sum()), rel=1e-3)
    errors = np.square(values - weights).sum(axis=1) / np.square(weights.astype(np.float64)).sum(axis=1)
    assert errors[-1] < 0.02


def test_narrow_weights_far_from_zero_keep_zero_among_the_symbols() -> None:
    """A line through two close values may meet 0 far beyond the grid; what is stored must be readable."""
    for centre, width in ((3.72, 0.012), (4.76, 0.0025), (4.93, 0.087), (4.988, 0.006)):
        sample = centre + width * np.random.default_rng(7).integers(0, 2, (64, 256)).astype(np.float32)
        grid = fit_grid(sample, PRICE, FREE)
        assert ZERO - 32 < grid.zero < ZERO + 32
        quantized = EcsqQuantizer(1 / centre).quantize(ArraySource("w", sample), choose)
        assert quantized.zero is not None and 0 <= quantized.zero <= 255
        assert quantized.error < 1e-3 * quantized.energy
