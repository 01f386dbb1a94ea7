"""The paper's grids against a float64 oracle, and the ends of float32."""

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from entrollm.errors import FormatError
from entrollm.quantize import Grid, Range, make_grid, measure_range, quantize_rows

FLOAT32_MAX = float(np.finfo(np.float32).max)
SMALLEST = float(np.finfo(np.float32).smallest_subnormal)

matrices = arrays(
    np.float32,
    st.tuples(st.integers(1, 6), st.integers(1, 12)),
    elements=st.floats(-(2.0**100), 2.0**100, width=32) | st.floats(-1, 1, width=32) | st.just(0.0),
)
bits_values = st.integers(2, 8)
granularities = st.sampled_from(["tensor", "row"])


def quantize(weights: np.ndarray, bits: int, granularity: str = "tensor") -> tuple[Grid, np.ndarray]:
    grid = make_grid(measure_range([weights], "w"), bits, granularity)
    return grid, quantize_rows(weights, grid)


def column(values: np.ndarray) -> np.ndarray:
    return values.astype(np.float64).reshape(-1, 1)


@given(matrices, bits_values, granularities)
def test_the_error_is_at_most_half_a_step(weights: np.ndarray, bits: int, granularity: str) -> None:
    grid, symbols = quantize(weights, bits, granularity)
    assert symbols.max() < 2**bits
    error = np.abs(grid.dequantize(symbols).astype(np.float64) - weights)
    step = np.abs(column(grid.scale))
    magnitude = np.abs(weights).max()
    assert (error <= 0.5 * step * (1 + 1e-4) + magnitude * 2.0**-22 + SMALLEST).all()


@given(matrices, bits_values, granularities)
def test_symbols_match_a_float64_oracle(weights: np.ndarray, bits: int, granularity: str) -> None:
    grid, symbols = quantize(weights, bits, granularity)
    offset = 0.0 if grid.offset is None else column(grid.offset)
    exact = (weights.astype(np.float64) - offset) / column(grid.scale)
    assert (np.abs(symbols - exact) <= 0.5 + 2.0**bits * 2.0**-22).all()


@given(matrices, bits_values)
def test_the_scheme_and_scale_are_the_papers(weights: np.ndarray, bits: int) -> None:
    grid, symbols = quantize(weights, bits)
    low, high = float(weights.min()), float(weights.max())
    if low == high:
        assert grid.scheme == "symmetric"
        assert len(np.unique(symbols)) == 1
        return
    both_signs = low < 0 < high
    assert grid.scheme == ("asymmetric" if both_signs else "symmetric")
    span = high - low if both_signs else max(abs(low), abs(high))
    if span > 1e-30:
        assert abs(grid.scale[0]) == pytest.approx(span / (2**bits - 1), rel=1e-6)
        assert symbols[weights == (low if high <= 0 else high)].min() == 2**bits - 1
        if both_signs:
            assert symbols[weights == low].max() == 0


@given(matrices, bits_values)
def test_a_grid_per_row_is_each_rows_own_grid(weights: np.ndarray, bits: int) -> None:
    grid, symbols = quantize(weights, bits, "row")
    assert grid.scale.shape == (len(weights),)
    for row, values in enumerate(weights):
        alone, alone_symbols = quantize(values[np.newaxis], bits, "tensor")
        np.testing.assert_array_equal(symbols[row], alone_symbols[0])
        assert grid.scale[row] == alone.scale[0]
        assert (0.0 if grid.offset is None else grid.offset[row]) == (0.0 if alone.offset is None else alone.offset[0])


@given(matrices, st.integers(1, 4), granularities)
def test_chunks_of_rows_give_the_same_result(weights: np.ndarray, step: int, granularity: str) -> None:
    grid, symbols = quantize(weights, 4, granularity)
    starts = range(0, len(weights), step)
    chunked = make_grid(measure_range([weights[row : row + step] for row in starts], "w"), 4, granularity)
    np.testing.assert_array_equal(chunked.scale, grid.scale)
    for row in starts:
        chunk = weights[row : row + step]
        np.testing.assert_array_equal(quantize_rows(chunk, chunked, row), symbols[row : row + step])
        np.testing.assert_array_equal(
            chunked.dequantize(symbols[row : row + step], row), grid.dequantize(symbols)[row : row + step]
        )


@pytest.mark.parametrize("shape", [(3, 70_000), (300, 700), (70_000, 3)])
def test_blocks_larger_than_the_cache_agree_with_numpy(shape: tuple[int, int]) -> None:
    weights = np.random.default_rng(1).standard_normal(shape).astype(np.float32)
    for granularity in ("tensor", "row"):
        grid, symbols = quantize(weights, 4, granularity)
        assert grid.offset is not None
        offset, scale = grid.offset.reshape(-1, 1), grid.scale.reshape(-1, 1)
        expected = np.clip(np.rint((weights - offset) / scale), 0, 15).astype(np.uint8)
        np.testing.assert_array_equal(symbols, expected)


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16])
def test_narrow_types_give_what_float32_gives(dtype: type) -> None:
    weights = np.random.default_rng(2).standard_normal((50, 3000)).astype(dtype)
    grid, symbols = quantize(weights, 8)
    wide_grid, wide_symbols = quantize(weights.astype(np.float32), 8)
    assert grid.scale == wide_grid.scale
    np.testing.assert_array_equal(symbols, wide_symbols)


def test_positive_weights_count_up_from_zero() -> None:
    grid, symbols = quantize(np.array([[0.0, 1.0, 2.0, 3.0]], np.float32), 2)
    assert (grid.scheme, grid.scale[0], grid.offset) == ("symmetric", 1.0, None)
    assert symbols.tolist() == [[0, 1, 2, 3]]


def test_negative_weights_take_a_negative_scale() -> None:
    grid, symbols = quantize(np.array([[0.0, -1.0, -2.0, -3.0]], np.float32), 2)
    assert (grid.scheme, grid.scale[0]) == ("symmetric", -1.0)
    assert symbols.tolist() == [[0, 1, 2, 3]]
    np.testing.assert_array_equal(grid.dequantize(symbols), np.array([[0, -1, -2, -3]], np.float32))


def test_weights_of_both_signs_count_from_their_minimum() -> None:
    grid, symbols = quantize(np.array([[-1.0, 0.0, 1.0, 2.0]], np.float32), 2)
    assert grid.offset is not None
    assert (grid.scheme, grid.scale[0], grid.offset[0]) == ("asymmetric", 1.0, -1.0)
    assert symbols.tolist() == [[0, 1, 2, 3]]


def test_tiny_weights_of_both_signs_are_asymmetric_though_their_product_underflows() -> None:
    grid, _ = quantize(np.array([[-1e-30, 1e-30]], np.float32), 4)
    assert grid.scheme == "asymmetric"


@pytest.mark.parametrize("value", [0.0, -0.0, 0.1, -0.1, SMALLEST, -SMALLEST, FLOAT32_MAX, -FLOAT32_MAX])
@pytest.mark.parametrize("granularity", ["tensor", "row"])
def test_a_constant_tensor_is_one_symbol_and_exact(value: float, granularity: str) -> None:
    weights = np.full((3, 5), value, np.float32)
    grid, symbols = quantize(weights, 4, granularity)
    assert len(np.unique(symbols)) == 1
    np.testing.assert_array_equal(grid.dequantize(symbols), weights)


def test_constant_rows_are_exact_beside_rows_of_both_signs() -> None:
    weights = np.array([[-1, 1, 0.5], [0, 0, 0], [0.3, 0.3, 0.3], [-7, -7, -7]], np.float32)
    grid, symbols = quantize(weights, 4, "row")
    assert grid.scheme == "asymmetric"
    np.testing.assert_array_equal(grid.dequantize(symbols)[1:], weights[1:])


@pytest.mark.parametrize("shape", [(0, 4), (3, 0), (0, 0)])
@pytest.mark.parametrize("granularity", ["tensor", "row"])
def test_a_tensor_without_weights_has_a_grid(shape: tuple[int, int], granularity: str) -> None:
    weights = np.zeros(shape, np.float32)
    grid, symbols = quantize(weights, 4, granularity)
    assert grid.scale.shape == ((1,) if granularity == "tensor" else shape[:1])
    assert (grid.scale != 0).all()
    assert symbols.shape == shape
    assert grid.dequantize(symbols).shape == shape


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("low", [0.0, -FLOAT32_MAX / 2])
def test_ranges_near_the_largest_float32_stay_finite(bits: int, low: float) -> None:
    weights = np.array([[low, low / 2, 0.0, (FLOAT32_MAX + low) * 0.3, FLOAT32_MAX + low]], np.float32)
    grid, symbols = quantize(weights, bits)
    values = grid.dequantize(symbols)
    assert np.isfinite(values).all()
    assert symbols[0, -1] == 2**bits - 1
    assert (np.abs(values.astype(np.float64) - weights) <= grid.scale[0] * 0.501).all()


@pytest.mark.parametrize("units", [1, 2, 7, 20, 255, 400])
@pytest.mark.parametrize("low", [0, -1, -3])
def test_denormal_ranges_keep_the_error_bound(units: int, low: int) -> None:
    weights = (np.arange(low, units + 1, dtype=np.float64) * SMALLEST).astype(np.float32).reshape(1, -1)
    grid, symbols = quantize(weights, 4)
    assert grid.scale[0] > 0
    error = np.abs(grid.dequantize(symbols).astype(np.float64) - weights)
    assert (error <= max(grid.scale[0] / 2, SMALLEST)).all()


def test_weights_wider_than_float32_are_refused() -> None:
    with pytest.raises(FormatError, match=r"a\.weight: its weights span .* wider than float32"):
        measure_range([np.array([[-FLOAT32_MAX, FLOAT32_MAX]], np.float32)], "a.weight")


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_a_weight_that_is_not_finite_is_named(bad: float, dtype: type) -> None:
    chunks = [np.ones((2, 3), dtype), np.ones((4, 3), dtype)]
    chunks[1][2, 1] = bad
    chunks[1][3, 0] = bad
    with pytest.raises(FormatError, match=rf"tensor 'a\.weight' has {bad} at \[4, 1\]; weights must be finite"):
        measure_range(chunks, "a.weight")


@pytest.mark.parametrize("bits", [1, 9])
def test_bits_out_of_range_are_refused(bits: int) -> None:
    with pytest.raises(ValueError, match=f"bits must be 2 to 8, found {bits}"):
        make_grid(Range(np.zeros(1, np.float32), np.ones(1, np.float32)), bits)
