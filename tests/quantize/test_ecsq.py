"""ECSQ: rounding by code lengths, row scales, outliers and what is refused."""

import functools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from entrollm.codec.choose import choose_code
from entrollm.codec.flat import best_window
from entrollm.codec.lengths import code_lengths
from entrollm.errors import FormatError
from entrollm.format.code import Code, Field, Leaf, Split
from entrollm.quantize.ecsq import EcsqQuantizer
from entrollm.quantize.method import ArraySource, Quantized
from entrollm.quantize.rounding import ZERO, Rounding
from tests.support.matrices import scale_values

choose = functools.partial(choose_code, blocks=16)
ANY = [1] * 256


def quantize(weights: NDArray[np.float32], step: float, **options: float) -> Quantized:
    return EcsqQuantizer(step, **options).quantize(ArraySource("w", weights), choose)


def dequantize(quantized: Quantized) -> NDArray[np.float64]:
    assert quantized.zero is not None
    integers = quantized.symbols.astype(np.float64) - quantized.zero
    return integers * scale_values(quantized.scale)[:, np.newaxis]


def gaussian(rows: int, columns: int, seed: int = 0) -> NDArray[np.float32]:
    return np.random.default_rng(seed).standard_normal((rows, columns)).astype(np.float32)


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 2**32 - 1), st.floats(0.01, 0.3))
def test_rounding_minimizes_error_and_length_together(seed: int, price: float) -> None:
    generator = np.random.default_rng(seed)
    lengths = generator.integers(1, 12, 256).astype(np.float64)
    # Lengths that differ little enough for the better of two neighbours to lie between them.
    lengths = 6 + (lengths - 6) / 6 / price
    scaled = (generator.standard_normal(200) * 5).astype(np.float32)
    symbols = Rounding(lengths, price).symbols(scaled)
    below = np.floor(scaled).astype(np.int64)
    candidates = np.stack([below, below + 1]) + ZERO
    costs = (scaled - (candidates - ZERO)) ** 2 + price * lengths[candidates]
    chosen = (scaled - (symbols.astype(np.float64) - ZERO)) ** 2 + price * lengths[symbols]
    np.testing.assert_allclose(chosen, costs.min(axis=0), atol=1e-5)


def test_rounding_without_a_price_goes_to_the_nearest_and_clips_at_the_ends() -> None:
    scaled = np.array([-1e9, -128.2, -0.4, 0.0, 0.6, 127.4, 1e9], np.float32)
    assert Rounding().symbols(scaled).tolist() == [0, 0, 128, 128, 129, 255, 255]


def test_code_lengths_of_every_kind_of_node() -> None:
    assert code_lengths(Code(Leaf(7)), ANY)[7] == 0
    tree = Split(Field(1, (128, 129)), Field(2, (120, 121, 122), Field(8, ())))
    lengths = code_lengths(Code(tree), ANY)
    assert lengths[128] == lengths[129] == 2
    assert lengths[120] == lengths[122] == 3
    assert lengths[0] == lengths[255] == 3 + 8
    low = code_lengths(Code(Field(1, (0, 8)), low_bits=3), ANY)
    assert set(low[:16]) == {4.0}
    assert set(low[16:]) == {8.0}


def test_a_finer_step_costs_bits_and_lowers_the_error() -> None:
    weights = gaussian(64, 512)
    coarse, fine = quantize(weights, 0.8), quantize(weights, 0.2)
    assert fine.error < coarse.error / 8
    assert np.count_nonzero(fine.counts) > np.count_nonzero(coarse.counts)


def test_the_stated_error_is_that_of_the_stored_scales() -> None:
    weights = gaussian(32, 384, seed=3)
    quantized = quantize(weights, 0.5)
    difference = dequantize(quantized) - weights
    assert quantized.error == pytest.approx(float((difference**2).sum()), rel=1e-4)
    assert quantized.energy == pytest.approx(float((weights.astype(np.float64) ** 2).sum()), rel=1e-5)
    # A uniform grid without scales would leave step^2 / 12.
    assert quantized.error / quantized.energy < 0.5**2 / 12 * 1.15


@pytest.mark.parametrize("step", [0.5, 1.0])
def test_rounding_by_length_comes_closer_to_the_rate_distortion_limit(step: float) -> None:
    weights = gaussian(256, 512, seed=1)

    def excess_bits(price: float) -> float:
        quantized = quantize(weights, step, price=price)
        counts = [int(c) for c in quantized.counts]
        lengths = code_lengths(choose(counts), counts)
        rate = float(quantized.counts @ lengths) / weights.size
        return rate - 0.5 * float(np.log2(quantized.energy / quantized.error))

    assert excess_bits(0.07) < excess_bits(0.0) - 0.005


def test_flat_codes_level_columns_whose_weights_differ() -> None:
    weights = gaussian(256, 192, seed=5)
    assert quantize(weights, 0.1, fits="flat").column_scale is None
    weights[:, ::16] *= 6
    assert quantize(weights, 0.1).column_scale is None
    assert quantize(weights[:2], 0.1, fits="flat").column_scale is None  # two rows do not pay a scale for each column

    def excess_bits(quantized: Quantized) -> float:
        bits = best_window(quantized.counts)[1] / weights.size
        return bits - 0.5 * float(np.log2(quantized.energy / quantized.error))

    flat = [quantize(weights, step, fits="flat") for step in (0.08, 0.1, 0.12)]
    for each in flat:
        assert each.column_scale is not None
        scales = scale_values(each.column_scale)
        assert scales[::16].mean() > 2 * np.delete(scales, np.s_[::16]).mean()
        difference = dequantize(each) * scales - weights
        assert each.error == pytest.approx(float((difference**2).sum()), rel=1e-4)
    uneven = [quantize(weights, step) for step in (0.05, 0.08, 0.1, 0.12, 0.2)]
    assert min(map(excess_bits, flat)) < min(map(excess_bits, uneven)) - 0.2


def test_outliers_are_not_clipped() -> None:
    weights = gaussian(8, 256)
    weights[3, 17] = 1000.0
    quantized = quantize(weights, 0.5)
    assert dequantize(quantized)[3, 17] == pytest.approx(1000.0, rel=0.01)
    others = np.delete(np.arange(8), 3)
    assert np.abs(dequantize(quantized) - weights)[others].max() < 40


@pytest.mark.parametrize("value", [0.0, 1.0, -2.5e-38, 3e38])
def test_constant_matrices_have_a_defined_result(value: float) -> None:
    quantized = quantize(np.full((4, 64), value, np.float32), 0.5)
    np.testing.assert_allclose(dequantize(quantized), value, rtol=2 ** (1 / 16) - 1)  # half a code of a short row


def test_a_row_of_zeros_stays_zero() -> None:
    weights = gaussian(4, 64)
    weights[2] = 0
    assert not dequantize(quantize(weights, 0.5))[2].any()


def test_weights_that_are_not_finite_are_refused() -> None:
    weights = gaussian(4, 64)
    weights[1, 5] = np.nan
    with pytest.raises(FormatError, match=r"tensor 'w' has nan at \[1, 5\]; weights must be finite"):
        quantize(weights, 0.5)


def test_precise_rows_get_finer_steps() -> None:
    weights = gaussian(2, 4096)
    quantized = EcsqQuantizer(0.5, np.array([1.0, 4.0], np.float32)).quantize(ArraySource("w", weights), choose)
    scales = scale_values(quantized.scale)
    ratio = scales[0] / scales[1]
    assert ratio == pytest.approx(4, rel=0.05)
