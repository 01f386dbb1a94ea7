"""Rounding to the paths of a trellis: paths are valid and the cheapest, on every device, and worth their trouble."""

from __future__ import annotations

import functools
import itertools

import numpy as np
import pytest
from numpy.typing import NDArray

from entrollm import _core
from entrollm.arrays import HOST
from entrollm.codec.choose import choose_code
from entrollm.codec.huffman import entropy_bits
from entrollm.codec.trellis import half_steps
from entrollm.quantize import trellis
from entrollm.quantize.ecsq import EcsqQuantizer
from entrollm.quantize.feedback import FeedbackQuantizer, feed_back
from entrollm.quantize.method import ArraySource, Quantized, Quantizer
from entrollm.quantize.rounding import Rounding
from entrollm.quantize.statistics import damped_factor
from entrollm.quantize.trellis import TRELLIS_ZERO, TrellisRounding

Floats = NDArray[np.float32]
choose = functools.partial(choose_code, blocks=8)
LENGTHS = np.abs(np.arange(256.0) - TRELLIS_ZERO) + 1


def gaussian(rows: int, columns: int, size: float = 2.0, seed: int = 0) -> Floats:
    return (np.random.default_rng(seed).standard_normal((rows, columns)) * size).astype(np.float32)


def correlated(columns: int) -> NDArray[np.float64]:
    """Second moments of correlated inputs."""
    generator = np.random.default_rng(2)
    mixing = generator.standard_normal((columns, columns // 4)) @ generator.standard_normal((columns // 4, columns))
    inputs = generator.standard_normal((4 * columns, columns)) @ (mixing + 4 * np.eye(columns))
    return inputs.T @ inputs / len(inputs)


@pytest.mark.parametrize("columns", [1, 2, 3, 63, 64, 65, 80, 81, 200])
def test_symbols_alone_give_the_numbers_of_a_row(columns: int) -> None:
    places = TrellisRounding(LENGTHS, 0.1, shift=-0.25).places(gaussian(37, columns))
    np.testing.assert_array_equal(half_steps(places.astype(np.uint8)), 2 * places)


@pytest.mark.parametrize("columns", [1, 2, 5])
def test_the_path_is_the_cheapest_of_all(columns: int) -> None:
    price, costs = 0.15, np.linspace(0.5, 2, columns, dtype=np.float32)
    paths = np.array(list(itertools.product(range(TRELLIS_ZERO - 3, TRELLIS_ZERO + 4), repeat=columns)), np.uint8)
    for row in gaussian(20, columns, 0.7):
        values = half_steps(paths) / 2 - TRELLIS_ZERO
        all_costs = (costs * ((row - values) ** 2 + price * LENGTHS[paths])).sum(axis=1)
        found = TrellisRounding(LENGTHS, price).places(row[None], costs)[0]
        cost = (costs * ((row + TRELLIS_ZERO - found) ** 2 + price * LENGTHS[found.astype(int)])).sum()
        assert cost == pytest.approx(all_costs.min(), rel=1e-5)


@pytest.mark.parametrize("isa_rows", [1, 15, 40])
@pytest.mark.parametrize("has_origin", [False, True])
def test_every_device_finds_the_same_paths(isa_rows: int, has_origin: bool) -> None:
    generator = np.random.default_rng(3)
    columns = 24
    left = gaussian(columns, isa_rows, 3.0)
    left[0, 0], left[1, 0] = 1e6, -1e6  # beyond the last symbols
    reach = np.tril(generator.standard_normal((columns, columns)), -1).astype(np.float32) / 4
    weights = generator.uniform(0.5, 2, columns).astype(np.float32)
    prices = (LENGTHS[: 2 * TRELLIS_ZERO] / 16).astype(np.float32)
    start = np.where(generator.random((4, isa_rows)) < 0.5, 0, 1e30).astype(np.float32)
    native = _core.round_trellis(left, reach, weights, prices, start, has_origin)
    round_block = trellis._round_first if has_origin else trellis._round
    (found,) = round_block(left.copy(), reach, weights, prices, start)
    np.testing.assert_array_equal(native, found)


@pytest.mark.parametrize(
    "change",
    [
        {"left": np.zeros((0, 2), np.float32)},
        {"left": np.zeros((_core.MOST_TRELLIS_COLUMNS + 1, 2), np.float32)},
        {"reach": np.zeros((2, 3), np.float32)},
        {"weights": np.zeros(2, np.float32)},
        {"prices": np.zeros(127, np.float32)},
        {"start": np.zeros((4, 1), np.float32)},
    ],
)
def test_arrays_that_do_not_fit_are_refused(change: dict[str, Floats]) -> None:
    shapes = {"left": (3, 2), "reach": (3, 3), "weights": (3,), "prices": (128,), "start": (4, 2)}
    arrays = {name: np.zeros(shape, np.float32) for name, shape in shapes.items()}
    with pytest.raises(ValueError, match="a block"):
        _core.round_trellis(**(arrays | change), has_origin=True)


def test_errors_are_fed_back_along_the_path_that_is_taken() -> None:
    """What feedback leaves of the columns must be what the numbers that it returns leave."""
    columns = 256
    weights, factor = gaussian(30, columns, 1.0), damped_factor(correlated(columns))
    steps = np.full(30, 0.5, np.float32), np.ones(columns, np.float32)
    errors = []
    for rounding in (Rounding(), TrellisRounding()):
        numbers = feed_back(weights, factor, steps, rounding, HOST)
        errors.append(float(np.square((weights - numbers / 2) @ factor).sum()))
    # Without feedback, it is 0.8.
    assert 0.7 < errors[1] / errors[0] < 0.87
    np.testing.assert_array_equal(half_steps(trellis_symbols(numbers)), 2 * numbers + 2 * TRELLIS_ZERO)


def trellis_symbols(numbers: Floats) -> NDArray[np.uint8]:
    return (np.floor(numbers) + TRELLIS_ZERO).astype(np.uint8)


def relative_bits(quantizer: Quantizer, weights: Floats, moments: NDArray[np.float64]) -> tuple[Quantized, float]:
    """Entropy and error together, in bits: a bit is worth a factor of 4 in the squared error of the outputs."""
    quantized = quantizer.quantize(ArraySource("w", weights), choose)
    error = quantized.weights() - weights.astype(np.float64)
    bits = entropy_bits([int(c) for c in quantized.counts])
    return quantized, bits + 0.5 * float(np.log2(np.trace(error @ moments @ error.T)))


@pytest.mark.parametrize(("step", "saved"), [(0.3, 0.07), (0.8, 0.05)])
def test_a_trellis_saves_bits_with_and_without_feedback(step: float, saved: float) -> None:
    columns = 256
    weights, moments, plain = gaussian(192, columns, 0.02), correlated(columns), np.eye(columns)
    # These moments spread the errors of a row over few columns, so feedback at equal steps leaves less to save.
    for measured, least, quantizers in (
        (plain, 0.13, [EcsqQuantizer(step, trellis=is_on) for is_on in (False, True)]),
        (moments, saved, [FeedbackQuantizer(step, damped_factor(moments), trellis=is_on) for is_on in (False, True)]),
    ):
        (_, before), (quantized, after) = (relative_bits(quantizer, weights, measured) for quantizer in quantizers)
        assert quantized.trellis
        assert after < before - least


def test_rows_of_zeros_stay_zero() -> None:
    weights, moments = gaussian(64, 128), correlated(128)
    weights[5] = 0
    quantizers: list[Quantizer] = [
        EcsqQuantizer(0.5, trellis=True),
        FeedbackQuantizer(0.5, damped_factor(moments), trellis=True),
    ]
    for quantizer in quantizers:
        quantized, _ = relative_bits(quantizer, weights, moments)
        assert quantized.trellis
        assert not quantized.weights()[5].any()
        zeros = quantizer.quantize(ArraySource("w", np.zeros((4, 128), np.float32)), choose)
        assert not zeros.weights().any()


@pytest.mark.parametrize("is_calibrated", [False, True])
def test_steps_too_fine_for_half_the_symbols_leave_the_trellis_out(is_calibrated: bool) -> None:
    weights, moments = gaussian(64, 128), correlated(128)
    quantizers: list[Quantizer] = [EcsqQuantizer(step, trellis=True) for step in (0.08, 0.03)]
    if is_calibrated:
        quantizers = [FeedbackQuantizer(step, damped_factor(moments), trellis=True) for step in (0.08, 0.01)]
    found = [quantizer.quantize(ArraySource("w", weights), choose) for quantizer in quantizers]
    assert [each.trellis for each in found] == [True, False]
    assert found[1].error < 0.3 * found[0].error
