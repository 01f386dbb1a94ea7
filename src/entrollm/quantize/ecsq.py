"""Entropy-coded scalar quantization (ECSQ): a uniform signed grid whose step sets the rate, whatever the width.

With an entropy code behind it, a uniform grid is within 0.255 bit of the rate-distortion limit at every rate, so the
step is free: it follows from the rate that is wanted, not from a number of bits.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from entrollm import _core
from entrollm.codec.lengths import code_lengths
from entrollm.errors import FormatError
from entrollm.quantize.method import CodeChooser, Float32, Quantized, RowSource, sum_counts
from entrollm.quantize.rounding import ZERO, Rounding

PRICE = 0.07
"""Squared steps per bit in rounding: less than the slope of the rate-distortion curve, since weights that are all
rounded towards 0 hurt a model more than their squared error says."""

# Rows of equal rate would all have steps in proportion to their size; rows of equal error, equal steps. Both lose the
# same, to second order in the spread of the rows: the one in the sharing of bits, the other because one code serves
# all rows. Half way between them, half of that loss is left.
_ROW_POWER = 0.5
# Weights that the code lengths are estimated from.
_SAMPLE_WEIGHTS = 1 << 18
_LARGEST_SYMBOL = 255 - ZERO
_BFLOAT16_MAX = 3.3895313892515355e38
_TINY = float(np.finfo(np.float32).tiny)


@dataclass(frozen=True)
class EcsqQuantizer:
    """ECSQ with a scale per row.

    Attributes:
        step: the grid's step over the RMS of the matrix; larger is coarser.
        row_precision: float32, shape (rows,), divides the steps of rows that matter more; None for all alike.
        price: what a bit is worth in rounding, in squared steps.
    """

    step: float
    row_precision: Float32 | None = None
    price: float = PRICE

    def quantize(self, source: RowSource, choose: CodeChooser) -> Quantized:
        """Quantize a matrix; a weight beyond 127 steps makes its whole row coarser, so that it is not clipped.

        Raises:
            FormatError: a weight is not finite.
        """
        steps = self._row_steps(source)
        rounding = self._rounding(source, steps, choose)
        symbols = np.empty(source.shape, np.uint8)
        scale = np.empty(source.shape[0], ml_dtypes.bfloat16)

        def quantize(chunk: tuple[int, int]) -> tuple[NDArray[np.int64], float, float]:
            rows = slice(*chunk)
            weights = source.read(*chunk).astype(np.float32)
            symbols[rows] = rounding.symbols(weights / steps[rows, np.newaxis])
            integers = symbols[rows].astype(np.float32)
            integers -= np.float32(ZERO)
            scale[rows] = fit_rows(weights, integers, steps[rows])
            integers *= scale[rows].astype(np.float32)[:, np.newaxis]
            integers -= weights
            return _core.histogram(symbols[rows]), _energy(integers), _energy(weights)

        histograms, errors, energies = zip(*source.map(quantize), strict=True)
        return Quantized(
            symbols=symbols,
            counts=sum_counts(histograms),
            grid=f"ecsq-{self.step:.4g}",
            scale=scale if len(scale) > 1 else scale.astype(np.float32),
            error=math.fsum(errors),
            energy=math.fsum(energies),
            zero=ZERO,
        )

    def _row_steps(self, source: RowSource) -> Float32:
        """The step of each row, exact in bfloat16; positive also where all weights are 0."""

        def measure(chunk: tuple[int, int]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
            weights = source.read(*chunk).astype(np.float32)
            largest = np.abs(weights).max(axis=1).astype(np.float64)
            if not np.isfinite(largest).all():
                row, column = (int(i) for i in np.argwhere(~np.isfinite(weights))[0])
                where = f"[{chunk[0] + row}, {column}]"
                raise FormatError(f"tensor {source.name!r} has {weights[row, column]} at {where}; it must be finite")
            # Squares of the ratios, since those of the weights may leave float32.
            weights /= np.maximum(largest, _TINY)[:, np.newaxis].astype(np.float32)
            return largest, largest * np.sqrt(np.einsum("ij,ij->i", weights, weights) / weights.shape[1])

        maxima, sizes = (np.concatenate(parts) for parts in zip(*source.map(measure), strict=True))
        whole = math.sqrt(float(np.mean(np.square(sizes / max(float(sizes.max()), _TINY))))) * float(sizes.max())
        if whole == 0.0:
            return np.ones(len(sizes), np.float32)
        steps = self.step * whole * (sizes / whole) ** _ROW_POWER
        if self.row_precision is not None:
            steps /= self.row_precision
        steps = np.maximum(steps, maxima / _LARGEST_SYMBOL)
        return _to_bfloat16(np.where(sizes > 0, steps, self.step * whole)).astype(np.float32)

    def _rounding(self, source: RowSource, steps: Float32, choose: CodeChooser) -> Rounding:
        """Rounding by the lengths of the code that a sample of the rows would get, once rounded by them."""
        rounding = Rounding()
        if self.price <= 0:
            return rounding
        rows, columns = source.shape
        stride = max(1, rows * columns // _SAMPLE_WEIGHTS)
        sample = np.concatenate([source.read(i, i + 1).astype(np.float32) / steps[i] for i in range(0, rows, stride)])
        # An ideal code stands in for the real one at first, whose choice takes longer than rounding a sample.
        rounding = Rounding(ideal_lengths(_core.histogram(rounding.symbols(sample))), self.price)
        counts = [int(c) for c in _core.histogram(rounding.symbols(sample))]
        return Rounding(code_lengths(choose(counts)), self.price)


def fit_rows(weights: Float32, integers: Float32, steps: Float32) -> NDArray[Any]:
    """The scale of each row with the least squared error, in bfloat16; `steps` for rows of zeros.

    Args:
        weights, integers: float32, shape (rows, columns).
        steps: float32, shape (rows,).
    """
    matched = np.einsum("ij,ij->i", weights, integers, dtype=np.float64)
    energy = np.einsum("ij,ij->i", integers, integers, dtype=np.float64)
    fitted = np.divide(matched, energy, out=steps.astype(np.float64), where=energy > 0)
    # A fit is within half a step of the step; rows of denormals may lose it to underflow.
    return _to_bfloat16(np.where(fitted > 0, fitted, steps))


def ideal_lengths(counts: NDArray[np.int64]) -> NDArray[np.float64]:
    """-log2 of the frequencies, at least 1; symbols that do not occur count as half an occurrence."""
    lengths: NDArray[np.float64] = np.log2(counts.sum()) - np.log2(np.maximum(counts, 0.5))
    return np.maximum(lengths, 1.0)


def _to_bfloat16(values: NDArray[np.float64]) -> NDArray[Any]:
    return np.clip(values, _TINY, _BFLOAT16_MAX).astype(ml_dtypes.bfloat16)


def _energy(values: Float32) -> float:
    flat = values.reshape(-1)
    with np.errstate(over="ignore"):
        energy = float(np.dot(flat, flat))
    return energy if math.isfinite(energy) else float(np.square(flat, dtype=np.float64).sum())
