"""Entropy-coded scalar quantization (ECSQ): a uniform signed grid whose step sets the rate.

With an entropy code, a uniform grid is within 0.255 bit of the rate-distortion limit at every rate. The step can
therefore be any number: it follows from the requested rate, not from a number of bits.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from entrollm import _core
from entrollm.errors import FormatError
from entrollm.format.log_scales import LogScales, octave_codes, short_base, snap
from entrollm.quantize.grid import PLAIN_GRID, AnyRounding, Choices, CodeFit, Grid, fit_rounding, grid_choices
from entrollm.quantize.method import (
    CodeChooser,
    Float32,
    Quantized,
    RowSource,
    out_of_range,
    sum_counts,
    sum_of_squares,
    too_large,
)
from entrollm.quantize.rounding import Rounding
from entrollm.quantize.trellis import TrellisRounding

PRICE = 0.07
"""What a bit is worth in rounding, in squared steps. It is less than the slope of the rate-distortion curve, because
rounding many weights towards 0 hurts a model more than its squared error suggests."""
WORTH_BITS = 0.15
"""About what a trellis saves. Where coarser steps of rows with large weights cost as much, it is left out."""

# With steps in proportion to the size of rows, all rows have the same rate; with equal steps, the same error. Both lose
# the same, to second order in the spread of the sizes: the first shares bits badly, the second has one code for unlike
# rows. Halfway between them, half of that loss is left.
_ROW_POWER = 0.5
# The same holds for columns, whose best steps are in inverse proportion to the size of their inputs.
_COLUMN_POWER = 0.5
# Fields of one width need numbers of one size, so steps of flat codes also grow with the weights of a column. That is
# worth a scale for each column where the logarithms of their sizes vary by this, and by this over the number of rows.
WEIGHT_POWER = 0.65
_LEAST_VARIANCE = 0.01
_LEAST_VARIANCE_OF_A_ROW = 4.0
# Inputs below this share of the RMS count as if they had it.
_SMALLEST_COLUMN = 0.02
# Code lengths are estimated from about this many weights.
_SAMPLE_WEIGHTS = 1 << 18
# The largest distance of a symbol from 0, half as large with a trellis. It leaves room for a grid that is shifted.
_LARGEST_SYMBOL = 118
_TINY = float(np.finfo(np.float32).tiny)


@dataclass(frozen=True)
class EcsqQuantizer:
    """ECSQ with a scale per row.

    Attributes:
        step: the step of the grid over the RMS of the matrix.
        row_precision: float32, shape (rows,), what the steps of the rows are divided by; None if all rows are alike.
        price: what a bit is worth in rounding, in squared steps.
        fits: the code that the grid may be stretched and shifted to suit.
        fine_scales: whether scales are fine enough for tuning.
        column_sizes: float32, shape (columns,), the RMS of the matrix's inputs, up to a factor; None if unknown.
        trellis: whether integers are to be those of a trellis of two grids, if they have room for the weights.
    """

    step: float
    row_precision: Float32 | None = None
    price: float = PRICE
    fits: CodeFit = "prefix"
    fine_scales: bool = False
    column_sizes: Float32 | None = None
    trellis: bool = False

    def quantize(self, source: RowSource, choose: CodeChooser) -> Quantized:
        """Quantize a matrix. A weight beyond 118 steps (59 with a trellis) makes its whole row coarser, not clipped.

        Raises:
            FormatError: a weight is not finite, or the weights are too large or too small for a step in float32.
        """
        columns, gain = self._column_steps(source)
        column_steps = np.ones(1, np.float32) if columns is None else columns.values()
        scaled = _Scaled(source, column_steps)
        steps, keeps_zero, trellis = self._row_steps(scaled, gain)
        choices = grid_choices(fits=self.fits, keeps_zero=keeps_zero, trellis=trellis)
        grid, rounding = self._rounding(scaled, steps.values(), choose, choices)
        steps = replace(steps, base=short_base(steps.base * grid.stretch))
        row_steps = steps.values()
        costs = self._costs(column_steps)
        symbols = np.empty(source.shape, np.uint8)
        codes = np.empty(len(steps), np.uint8)

        def quantize(chunk: tuple[int, int]) -> tuple[NDArray[np.int64], float, float]:
            rows = slice(*chunk)
            weights = scaled.read(*chunk)
            found = rounding.places(weights / row_steps[rows, np.newaxis], costs)
            symbols[rows] = found
            found -= np.float32(grid.zero)
            scale = steps.nearest(fit_rows(weights, found, row_steps[rows]))
            codes[rows] = scale.codes
            with np.errstate(over="ignore"):  # an infinite error is refused below
                found *= scale.values()[:, np.newaxis]
                found -= weights
            if columns is not None:
                found *= column_steps
                weights *= column_steps
            return _core.histogram(symbols[rows]), sum_of_squares(found), sum_of_squares(weights)

        histograms, errors, energies = zip(*source.map(quantize), strict=True)
        if not math.isfinite(sum(errors)):
            raise too_large(source.name)
        scale = replace(steps, codes=codes)
        quantized = Quantized(
            symbols=symbols,
            counts=sum_counts(histograms),
            grid=f"ecsq-{self.step:.4g}",
            scale=scale if len(scale) > 1 else scale.values(),
            error=math.fsum(errors),
            energy=math.fsum(energies),
            zero=grid.zero,
            column_scale=columns,
        )
        return quantized.in_half_steps() if isinstance(rounding, TrellisRounding) else quantized

    def _column_steps(self, source: RowSource) -> tuple[LogScales | None, float]:
        """Steps of the columns around 1, and the factor on all steps at which they do the damage of equal ones."""
        sizes = self._input_sizes(source.shape[1])
        weights = _column_spread(source) if self.fits == "flat" else None
        if sizes is None and weights is None:
            return None, 1.0
        wanted = np.ones(source.shape[1])
        if sizes is None:
            sizes = wanted
        else:
            wanted = (sizes / float(np.exp(np.log(sizes).mean()))) ** -_COLUMN_POWER
        if weights is not None:
            wanted = wanted * weights**WEIGHT_POWER
        columns = snap(wanted, octave_codes(source.shape[0], self.step, self.fine_scales), 1.0)
        damage = float(np.square(sizes * columns.values()).mean())
        return columns, math.sqrt(float(np.square(sizes).mean()) / damage)

    def _input_sizes(self, columns: int) -> NDArray[np.float64] | None:
        """The sizes of the inputs, none of them very small; None if unknown."""
        if self.column_sizes is None:
            return None
        sizes = self.column_sizes.astype(np.float64)
        whole = math.sqrt(float(np.square(sizes).mean()))
        return np.maximum(sizes, _SMALLEST_COLUMN * whole) if 0 < whole < math.inf else None

    def _costs(self, column_steps: Float32) -> Float32 | None:
        """What the square of an error in steps does in each column, around 1; None if it is the same in all."""
        sizes = self._input_sizes(len(column_steps))
        if sizes is None:
            return None
        damage = np.square(sizes * column_steps)
        costs: Float32 = (damage / damage.mean()).astype(np.float32)
        return costs

    def _row_steps(self, source: _Scaled, gain: float) -> tuple[LogScales, bool, bool]:
        """The steps of the rows, all positive; whether all weights of a row are 0, and whether a trellis pays."""

        def measure(chunk: tuple[int, int]) -> tuple[NDArray[np.float64], ...]:
            weights = source.read(*chunk)
            largest = np.abs(weights).max(axis=1).astype(np.float64)
            if not np.isfinite(largest).all():
                row, column = (int(i) for i in np.argwhere(~np.isfinite(weights))[0])
                where = f"[{chunk[0] + row}, {column}]"
                raise FormatError(
                    f"tensor {source.name!r} has {weights[row, column]} at {where}; weights must be finite"
                )
            # Ratios are squared, because squares of the weights may exceed float32.
            weights /= np.maximum(largest, _TINY)[:, np.newaxis].astype(np.float32)
            size = largest * np.sqrt(np.einsum("ij,ij->i", weights, weights) / weights.shape[1])
            weights *= source.column_steps
            return largest, size, largest * np.sqrt(np.einsum("ij,ij->i", weights, weights) / weights.shape[1])

        maxima, sizes, plain = (np.concatenate(parts) for parts in zip(*source.map(measure), strict=True))
        whole = math.sqrt(float(np.mean(np.square(sizes / max(float(sizes.max()), _TINY))))) * float(sizes.max())
        if whole == 0.0:
            return snap(np.ones(len(sizes)), 1), True, False
        if self.step * whole < _TINY:
            raise out_of_range(
                source.name, f"its weights, of size {whole:.3g}, are too small for free steps in float32"
            )
        gain *= math.sqrt(float(np.mean(np.square(plain / whole))))
        steps = self.step * gain * whole * (sizes / whole) ** _ROW_POWER
        if self.row_precision is not None:
            steps /= self.row_precision
        finest = octave_codes(source.shape[1], self.step, self.fine_scales)
        steps = np.where(sizes > 0, steps, self.step * whole)
        widest = maxima / _LARGEST_SYMBOL * 2 ** (0.5 / finest)
        trellis = self.trellis and float(np.log2(np.maximum(2 * widest / steps, 1.0)).mean()) < WORTH_BITS
        steps = np.maximum(np.maximum(steps, (1 + trellis) * widest), _TINY)
        return snap(steps, finest), bool(sizes.min() == 0), trellis

    def _rounding(
        self, source: _Scaled, steps: Float32, choose: CodeChooser, choices: Choices
    ) -> tuple[Grid, AnyRounding]:
        """A grid, and rounding by the lengths of the code that a sample of the rows would get on the grid."""
        if self.price <= 0:
            return PLAIN_GRID, Rounding()
        rows, columns = source.shape
        stride = max(1, rows * columns // _SAMPLE_WEIGHTS)
        sample = np.concatenate([source.read(i, i + 1) / steps[i] for i in range(0, rows, stride)])
        return fit_rounding(sample, self.price, choose, choices)


class _Scaled:
    """A matrix in float32 whose columns are divided by their steps."""

    def __init__(self, source: RowSource, column_steps: Float32) -> None:
        self.name, self.shape = source.name, source.shape
        self.map = source.map
        self.column_steps = column_steps
        self._source = source

    def read(self, begin: int, end: int) -> Float32:
        """Rows [begin, end), a new array."""
        weights: Float32 = self._source.read(begin, end).astype(np.float32)
        if len(self.column_steps) > 1:
            weights /= self.column_steps
        return weights


def _column_spread(source: RowSource) -> NDArray[np.float64] | None:
    """The sizes of the columns of a matrix around 1, none of them very small; None if they are about equal."""
    rows = source.shape[0]
    energies = source.map(lambda chunk: np.square(source.read(*chunk), dtype=np.float64).sum(axis=0))
    logarithms = log_spread(np.sqrt(np.sum(energies, axis=0) / rows))
    is_spread = float(np.square(logarithms).mean()) > max(_LEAST_VARIANCE, _LEAST_VARIANCE_OF_A_ROW / rows)
    return np.exp(logarithms) if is_spread else None


def log_spread(sizes: NDArray[np.float64]) -> NDArray[np.float64]:
    """The logarithms of the sizes of columns around 0, none of them very small; zeros if the sizes are not finite."""
    whole = math.sqrt(float(np.square(sizes).mean()))
    if not 0 < whole < math.inf:
        return np.zeros(len(sizes))
    logarithms = np.log(np.maximum(sizes, _SMALLEST_COLUMN * whole))
    centred: NDArray[np.float64] = logarithms - logarithms.mean()
    return centred


def fit_rows(weights: Float32, found: Float32, steps: Float32) -> NDArray[np.float64]:
    """The scale of each row that has the least squared error.

    Args:
        weights: float32, shape (rows, columns).
        found: float32, the same shape, the quantized weights in steps.
        steps: float32, shape (rows,), the scales of rows whose quantized weights are all 0.
    """
    matched = np.einsum("ij,ij->i", weights, found, dtype=np.float64)
    energy = np.einsum("ij,ij->i", found, found, dtype=np.float64)
    fitted = np.divide(matched, energy, out=steps.astype(np.float64), where=energy > 0)
    # A fit is within half a step of the step, unless a row of denormals underflows.
    return np.where(fitted > _TINY, fitted, steps)
