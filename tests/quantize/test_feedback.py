"""Feedback quantization: the output error, not the weights' error, is what falls."""

import functools

import numpy as np
import pytest
from numpy.typing import NDArray

from entrollm.codec.choose import Prefer, choose_code, stored_bits
from entrollm.codec.flat import best_window
from entrollm.errors import FormatError
from entrollm.format.log_scales import LogScales
from entrollm.quantize.ecsq import EcsqQuantizer
from entrollm.quantize.feedback import FeedbackQuantizer
from entrollm.quantize.gptq import GptqQuantizer
from entrollm.quantize.grid import CodeFit
from entrollm.quantize.method import ArraySource, Quantized, Quantizer
from entrollm.quantize.statistics import damped_factor
from tests.support.matrices import scale_values

COLUMNS = 160
choose = functools.partial(choose_code, blocks=8)


@pytest.fixture(scope="module")
def moments() -> NDArray[np.float64]:
    """Second moments of correlated inputs of unlike sizes."""
    generator = np.random.default_rng(2)
    mixing = generator.standard_normal((COLUMNS, COLUMNS // 4)) @ generator.standard_normal((COLUMNS // 4, COLUMNS))
    mixing += 4 * np.eye(COLUMNS)
    inputs = generator.standard_normal((4000, COLUMNS)) @ mixing * np.exp(generator.standard_normal(COLUMNS) / 2)
    return inputs.T @ inputs / len(inputs)


@pytest.fixture(scope="module")
def weights() -> NDArray[np.float32]:
    return np.random.default_rng(3).standard_normal((192, COLUMNS)).astype(np.float32)


def run(quantizer: Quantizer, weights: NDArray[np.float32]) -> tuple[Quantized, NDArray[np.float64]]:
    quantized = quantizer.quantize(ArraySource("w", weights), choose)
    assert quantized.zero is not None
    values = (quantized.symbols.astype(np.float64) - quantized.zero) * scale_values(quantized.scale)[:, None]
    if quantized.column_scale is not None:
        values *= scale_values(quantized.column_scale)
    return quantized, values


def bits(quantized: Quantized) -> float:
    counts = [int(c) for c in quantized.counts]
    return stored_bits(choose(counts), counts, 8)


def output_error(values: NDArray[np.float64], weights: NDArray[np.float32], moments: NDArray[np.float64]) -> float:
    difference = values - weights
    original = weights.astype(np.float64)
    return float(np.trace(difference @ moments @ difference.T) / np.trace(original @ moments @ original.T))


@pytest.mark.parametrize("is_calibrated", [False, True])
def test_quantizers_that_know_flat_codes_save_patches(
    is_calibrated: bool, weights: NDArray[np.float32], moments: NDArray[np.float64]
) -> None:
    """At equal error, in bits of flat codes."""
    measured = moments if is_calibrated else np.eye(COLUMNS)

    def excess_bits(fits: CodeFit, prefer: Prefer) -> float:
        quantizer = FeedbackQuantizer(0.55, damped_factor(moments), fits=fits) if is_calibrated else None
        chooser = functools.partial(choose_code, blocks=8, prefer=prefer)
        quantized = (quantizer or EcsqQuantizer(0.55, fits=fits)).quantize(ArraySource("w", weights), chooser)
        flat_bits = best_window([int(c) for c in quantized.counts])[1] / weights.size
        return flat_bits + 0.5 * float(np.log2(output_error(quantized.weights().astype(np.float64), weights, measured)))

    assert excess_bits("flat", "speed") < excess_bits("none", "size") - 0.05


def test_steps_of_flat_codes_grow_with_the_weights_of_a_column(
    monkeypatch: pytest.MonkeyPatch, weights: NDArray[np.float32], moments: NDArray[np.float64]
) -> None:
    unlike = weights * np.exp(0.7 * np.random.default_rng(4).standard_normal(COLUMNS)).astype(np.float32)

    def least_excess_bits() -> float:
        found = []
        for step in (0.3, 0.36, 0.43, 0.52, 0.62):
            quantizer = FeedbackQuantizer(step, damped_factor(moments), fits="flat")
            quantized = quantizer.quantize(ArraySource("w", unlike), functools.partial(choose, prefer="speed"))
            bits = best_window([int(c) for c in quantized.counts])[1] / unlike.size
            error = output_error(quantized.weights().astype(np.float64), unlike, moments)
            found.append(bits + 0.5 * float(np.log2(error)))
        return min(found)

    leveled = least_excess_bits()
    monkeypatch.setattr("entrollm.quantize.feedback.WEIGHT_POWER", 0.0)
    assert leveled < least_excess_bits() - 0.05


@pytest.mark.parametrize("step", [0.4, 0.9])
def test_the_output_error_is_far_below_that_of_rounding_alone_at_equal_bits(
    step: float, weights: NDArray[np.float32], moments: NDArray[np.float64]
) -> None:
    plain, plain_values = run(EcsqQuantizer(step), weights)
    feedback, values = run(FeedbackQuantizer(step, damped_factor(moments)), weights)
    # A bit is worth a factor of 4 in squared error.
    ours = output_error(values, weights, moments) * 4 ** bits(feedback)
    theirs = output_error(plain_values, weights, moments) * 4 ** bits(plain)
    assert ours < 0.6 * theirs


def test_uncorrelated_inputs_leave_little_to_gain_and_nothing_to_lose(weights: NDArray[np.float32]) -> None:
    identity = np.eye(COLUMNS)
    plain, plain_values = run(EcsqQuantizer(0.5), weights)
    feedback, values = run(FeedbackQuantizer(0.5, damped_factor(identity)), weights)
    ratio = output_error(values, weights, identity) * 4 ** bits(feedback)
    ratio /= output_error(plain_values, weights, identity) * 4 ** bits(plain)
    assert 0.9 < ratio < 1.03


def test_the_stated_error_is_that_of_the_weights(weights: NDArray[np.float32], moments: NDArray[np.float64]) -> None:
    quantized, values = run(FeedbackQuantizer(0.5, damped_factor(moments)), weights)
    assert quantized.error == pytest.approx(float(((values - weights) ** 2).sum()), rel=1e-4)
    assert quantized.column_scale is not None
    assert isinstance(quantized.scale, LogScales) and isinstance(quantized.column_scale, LogScales)


def test_dead_inputs_and_rows_of_zeros_have_a_defined_result(
    weights: NDArray[np.float32], moments: NDArray[np.float64]
) -> None:
    moments = moments.copy()
    moments[7] = moments[:, 7] = 0
    weights = weights.copy()
    weights[5] = 0
    _, values = run(FeedbackQuantizer(0.5, damped_factor(moments)), weights)
    assert np.isfinite(values).all()
    assert not values[5].any()


def test_all_inputs_dead_is_plain_rounding() -> None:
    np.testing.assert_array_equal(damped_factor(np.zeros((3, 3))), np.eye(3))


def test_a_singular_covariance_is_damped() -> None:
    direction = np.arange(1.0, 9.0)
    factor = damped_factor(np.outer(direction, direction))
    assert np.isfinite(factor).all()
    assert (np.diag(factor) > 0).all()


def test_a_matrix_of_zeros_stays_zero(moments: NDArray[np.float64]) -> None:
    _, values = run(FeedbackQuantizer(0.5, damped_factor(moments)), np.zeros((4, COLUMNS), np.float32))
    assert not values.any()


def test_weights_that_are_not_finite_are_refused(moments: NDArray[np.float64]) -> None:
    weights = np.zeros((4, COLUMNS), np.float32)
    weights[2, 3] = np.inf
    with pytest.raises(FormatError, match=r"tensor 'w' has inf at \[2, 3\]; weights must be finite"):
        run(FeedbackQuantizer(0.5, damped_factor(moments)), weights)


def test_gptq_lies_between_rounding_alone_and_feedback(
    weights: NDArray[np.float32], moments: NDArray[np.float64]
) -> None:
    factor = damped_factor(moments)
    errors = []
    for quantizer in (EcsqQuantizer(0.5), GptqQuantizer(0.5, factor), FeedbackQuantizer(0.5, factor)):
        quantized, values = run(quantizer, weights)
        errors.append(output_error(values, weights, moments) * 4 ** bits(quantized))
    assert 1.2 * errors[2] < errors[1] < 0.8 * errors[0]


def test_gptq_keeps_rows_of_zeros_and_has_no_column_scales(
    weights: NDArray[np.float32], moments: NDArray[np.float64]
) -> None:
    weights = weights.copy()
    weights[5] = 0
    precision = np.linspace(0.5, 2, len(weights), dtype=np.float32)
    quantized, values = run(GptqQuantizer(0.5, damped_factor(moments), precision), weights)
    assert not values[5].any()
    assert quantized.column_scale is None
    scales = scale_values(quantized.scale)
    ratio = scales[-1] / scales[0] * np.sqrt(np.linalg.norm(weights[0]) / np.linalg.norm(weights[-1]))
    assert ratio == pytest.approx(0.25, rel=0.02)
    assert not run(GptqQuantizer(0.5, damped_factor(moments)), np.zeros((4, COLUMNS), np.float32))[1].any()


def test_gptq_refuses_weights_that_are_not_finite(moments: NDArray[np.float64]) -> None:
    with pytest.raises(FormatError, match=r"tensor 'w' has nan at \[0, 0\]; weights must be finite"):
        run(GptqQuantizer(0.5, damped_factor(moments)), np.full((4, COLUMNS), np.nan, np.float32))
