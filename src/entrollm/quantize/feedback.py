"""Calibrated quantization with error feedback, column by column.

What matters is the error of a matrix's outputs, tr(E H E^T), where H = E[x x^T] are the second moments of its inputs.
With H = L L^T this is the squared norm of (W - What) L. Since L is triangular, columns can be rounded one after
another, each compensating for the errors of those rounded before it (GPTQ, arXiv 2210.17323). For a given rate, the
best steps are inversely proportional to the diagonal of L, and every column is rescaled by least squares (WaterSIC,
arXiv 2603.04956). That holds if each column has its own code. Here one code serves a whole matrix, so steps go only
half of the way, as they do for rows in ecsq.py.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from entrollm import _core
from entrollm.arrays import HOST, Array, Device, double, functions, like, single, solve_positive
from entrollm.errors import FormatError
from entrollm.format.log_scales import LogScales, octave_codes, short_base, snap
from entrollm.quantize.ecsq import PRICE, WEIGHT_POWER, WORTH_BITS, log_spread
from entrollm.quantize.grid import PLAIN_GRID, AnyRounding, CodeFit, Grid, fit_grid, fit_rounding, grid_choices
from entrollm.quantize.method import CodeChooser, Float32, Quantized, RowSource, out_of_range, sum_counts
from entrollm.quantize.rounding import BLOCK_COLUMNS, ZERO, Rounding, round_columns
from entrollm.quantize.trellis import Path, TrellisRounding

_COLUMN_POWER = 0.5
_ROW_POWER = 0.5
_SAMPLE_ROWS = 128
_REFINEMENTS = 2
_RIDGE = 1e-6
# The largest distance of a symbol from 0, half as large with a trellis. It leaves room for a shifted grid and for steps
# that are rounded down.
_LARGEST_SYMBOL = 112
# Largest weights of a matrix whose squares, and their products with squares of inputs, float32 holds.
_SMALLEST, _LARGEST = 1e-14, 1e14


@dataclass(frozen=True)
class FeedbackQuantizer:
    """Successive quantization with scales of rows and of columns. It holds a whole matrix in float32.

    Attributes:
        step: the step of the grid over the RMS of the matrix times the RMS of its inputs.
        factor: float32, shape (columns, columns), on the device; see `Statistics.factor`.
        row_precision: float32, shape (rows,), what the steps of the rows are divided by; None if all rows are alike.
        price: what a bit is worth in rounding, in squared steps.
        fits: the code that the grid may be stretched and shifted to suit.
        fine_scales: whether scales are fine enough for tuning.
        device: the device that computes.
        correction: float32, shape (rows, columns), on the device, added to the weights before they are rounded; None
            if absent. The stated error is that against the weights without it.
        is_draft: whether only the histogram of the integers is needed, so that scales need not be fitted.
        trellis: whether integers are to be those of a trellis of two grids, if they have room for the weights.
    """

    step: float
    factor: Array
    row_precision: Float32 | None = None
    price: float = PRICE
    fits: CodeFit = "prefix"
    fine_scales: bool = False
    device: Device = HOST
    correction: Array | None = None
    is_draft: bool = False
    trellis: bool = False

    def quantize(self, source: RowSource, choose: CodeChooser) -> Quantized:
        """Quantize a matrix.

        Raises:
            FormatError: a weight is not finite.
        """
        weights = read_finite(source, self.device)
        wanted = weights if self.correction is None else weights + self.correction
        steps, trellis = self._steps(wanted)
        grid, rounding = self._rounding(wanted, steps, trellis, choose)
        rows, columns = self._stored(steps[0], steps[1] * grid.stretch)
        steps = self.device.put(rows.values()), self.device.put(columns.values())
        # On a shifted grid, integers stand for the weights minus the shift, which is added back after the rounding.
        left = wanted - grid.shift * steps[0][:, None] * steps[1] if grid.shift else wanted
        integers = feed_back(left, self.factor, steps, rounding, self.device)
        symbols = to_symbols(integers, self.device, rounding.zero)
        integers += grid.shift
        if not self.is_draft:
            rows, columns = self._refine(wanted, integers, rows, columns)
        integers *= self.device.put(rows.values())[:, None]
        integers *= self.device.put(columns.values())
        quantized = Quantized(
            symbols=symbols,
            counts=sum_counts(source.map(lambda rows: _core.histogram(symbols[rows[0] : rows[1]]))),
            grid=f"feedback-{self.step:.4g}",
            scale=rows if len(rows) > 1 else rows.values(),
            error=energy(integers - weights),
            energy=energy(weights),
            zero=rounding.zero - grid.shift,
            column_scale=columns,
            dense=integers if self.device.spare else None,
        )
        return quantized.in_half_steps() if isinstance(rounding, TrellisRounding) else quantized

    def _steps(self, weights: Array) -> tuple[tuple[Array, Array], bool]:
        """Steps of rows, around 1, and of columns, whose product is that of a weight; and whether a trellis pays."""
        take = self.device.take
        diagonal = take(functions(self.factor).diagonal(self.factor)).astype(np.float64)
        inputs = math.sqrt(energy(self.factor) / len(diagonal))
        sizes = row_sizes(weights, self.device)
        whole = math.sqrt(float(np.square(sizes).mean()))
        if whole == 0.0:
            rows, columns = np.ones(len(weights), np.float32), np.ones(len(diagonal), np.float32)
            return (like(weights, rows), like(weights, columns)), False
        typical = float(np.exp(np.log(diagonal).mean()))
        relative = (diagonal / typical) ** -_COLUMN_POWER
        if self.fits == "flat":
            relative = _leveled(relative, diagonal, weights, self.device)
        by_column = self.step * whole * inputs / typical * relative
        column_steps = like(weights, by_column.astype(np.float32))
        by_row = np.where(sizes > 0, sizes / whole, 1.0) ** _ROW_POWER
        if self.row_precision is not None:
            by_row /= self.row_precision
        widest = take(row_maxima(weights / column_steps)) / _LARGEST_SYMBOL
        trellis = self.trellis and float(np.log2(np.maximum(2 * widest / by_row, 1.0)).mean()) < WORTH_BITS
        by_row = np.maximum(by_row, (1 + trellis) * widest)
        return (like(weights, by_row.astype(np.float32)), column_steps), trellis

    def _rounding(
        self, weights: Array, steps: tuple[Array, Array], trellis: bool, choose: CodeChooser
    ) -> tuple[Grid, AnyRounding]:
        """A grid, and rounding by the code lengths of a sample of the rows; a draft estimates the lengths."""
        if self.price <= 0:
            return PLAIN_GRID, Rounding()
        keeps_zero = not float(row_maxima(weights).min())
        choices = grid_choices(fits=self.fits, keeps_zero=keeps_zero, trellis=trellis)
        if self.is_draft:
            grid = fit_grid(self.device.take(weights / steps[0][:, None] / steps[1]), self.price, choices)
            return grid, choices.rounding(grid.lengths, self.price)
        picked = slice(None, None, max(1, len(weights) // _SAMPLE_ROWS))
        sample, row_steps = weights[picked], steps[0][picked][:, None]
        integers = feed_back(sample, self.factor, (steps[0][picked], steps[1]), Rounding(), self.device)
        # The numbers that were rounded are the integers plus the errors that they left, in units of the steps.
        errors = (sample - integers * row_steps * steps[1]) @ self.factor
        rounded = integers + errors / row_steps / (steps[1] * functions(errors).diagonal(self.factor))
        return fit_rounding(self.device.take(rounded), self.price, choose, choices)

    def _stored(self, row_steps: Array, column_steps: Array) -> tuple[LogScales, LogScales]:
        """The nearest steps that can be stored. Those of columns are scaled to be around 1, those of rows to match."""
        by_row, by_column = (self.device.take(steps).astype(np.float64) for steps in (row_steps, column_steps))
        typical = float(np.exp(np.log(by_column).mean()))
        rows = snap(by_row * typical, octave_codes(len(by_column), self.step, self.fine_scales))
        return rows, snap(by_column / typical, octave_codes(len(by_row), self.step, self.fine_scales), 1.0)

    def _refine(
        self, weights: Array, integers: Array, rows: LogScales, columns: LogScales
    ) -> tuple[LogScales, LogScales]:
        """Fit row and column scales by alternating least squares of the output error, on the grids of the steps."""
        put, take = self.device.put, self.device.take
        moments = self.factor @ self.factor.T
        wanted = weights @ moments
        row_scale, column_scale = double(put(rows.values())), double(put(columns.values()))
        for _ in range(_REFINEMENTS):
            column_scale = _fit_columns(integers, row_scale, column_scale, moments, wanted)
            row_scale = _fit_rows(integers, row_scale, column_scale, moments, wanted)
        # The common factor of all columns goes to the rows, and to the base of their codes.
        fitted = take(column_scale)
        typical = float(np.exp(np.log(fitted / columns.values()).mean()))
        columns = snap(fitted / typical, columns.per_octave, columns.base)
        row_scale = _fit_rows(integers, row_scale * typical, double(put(columns.values())), moments, wanted)
        fitted = take(row_scale)
        moved = float(np.exp(np.log(fitted / rows.values()).mean()))
        return snap(fitted, rows.per_octave, short_base(rows.base * moved)), columns


def _leveled(
    steps: NDArray[np.float64], diagonal: NDArray[np.float64], weights: Array, device: Device
) -> NDArray[np.float64]:
    """Steps of columns that also grow with the weights of a column, for flat codes, and do the damage of the others."""
    leveled = steps * np.exp(WEIGHT_POWER * log_spread(row_sizes(weights.T, device)))
    damage = np.square(diagonal * leveled).sum() / np.square(diagonal * steps).sum()
    return leveled / math.sqrt(float(damage))


def read_finite(source: RowSource, device: Device = HOST) -> Array:
    """Read a whole matrix in float32.

    Raises:
        FormatError: a weight is not finite, or the weights are so large or so small that their squares leave float32.
    """
    weights = device.put(source.read(0, source.shape[0]))
    if not functions(weights).isfinite(weights).all():
        found = device.take(weights)
        row, column = (int(i) for i in np.argwhere(~np.isfinite(found))[0])
        raise FormatError(
            f"tensor {source.name!r} has {found[row, column]} at [{row}, {column}]; weights must be finite"
        )
    largest = float(row_maxima(weights).max())
    if largest and not _SMALLEST <= largest <= _LARGEST:
        raise out_of_range(source.name, f"its largest weight is {largest:.3g}, beyond the range of calibrated rounding")
    return weights


def to_symbols(integers: Array, device: Device, zero: int = ZERO) -> NDArray[np.uint8]:
    """The symbols of integers around 0, or of numbers of a trellis: uint8, stored by rows."""
    xp = functions(integers)
    symbols: NDArray[np.uint8] = device.take(xp.asarray(xp.floor(integers) + float(zero), dtype=xp.uint8))
    return np.ascontiguousarray(symbols)


def energy(values: Array) -> float:
    """The sum of squares."""
    xp = functions(values)
    return float(xp.sum(xp.square(values), dtype=xp.float64))


def row_sizes(weights: Array, device: Device) -> NDArray[np.float64]:
    """The RMS of each row."""
    xp = functions(weights)
    squares: NDArray[np.float64] = device.take(xp.mean(xp.square(weights), axis=1, dtype=xp.float64))
    return np.sqrt(squares)


def row_maxima(weights: Array) -> Array:
    """The largest magnitude of each row."""
    xp = functions(weights)
    return xp.amax(xp.abs(weights), axis=1)


def feed_back(
    weights: Array, factor: Array, steps: tuple[Array, Array], rounding: AnyRounding, device: Device = HOST
) -> Array:
    """Round all columns, the last one first, each compensating for the errors of those rounded before it.

    Args:
        weights: float32, shape (rows, columns).
        factor: float32, shape (columns, columns), lower triangle.
        steps: of the rows and of the columns; the step of a weight is their product.
        rounding: rounds numbers to integers, or to numbers of a trellis.
        device: the device of the arrays.
    Returns:
        the integers or numbers, float32, shape (rows, columns).
    """
    row_steps, column_steps = steps
    units = column_steps * functions(weights).diagonal(factor)
    # The columns that are left to round, in units of the steps; each is a row here.
    left = factor.T @ (weights / row_steps[:, None]).T
    left /= units[:, None]
    integers = functions(weights).empty_like(left)
    if isinstance(rounding, TrellisRounding):
        costs = functions(units).square(units / units.mean())
        columns: Path | _Columns = Path(rounding.prices, costs, left, device)
    else:
        columns = _Columns(like(left, rounding.thresholds), device)
    for end in range(len(left), 0, -BLOCK_COLUMNS):
        begin, first = max(0, end - BLOCK_COLUMNS), columns.first(end)
        # What an integer of 1 in a column takes from each column before it.
        reach = factor[first:end, :end] * column_steps[first:end, None] / units[:end]
        integers[begin:end] = columns.round(left, reach[:, first:], end)
        if begin:
            left[:begin] -= reach[begin - first :, :begin].T @ integers[begin:end]
    return integers.T


class _Columns:
    """Rounds the columns of a block to integers; see `Path`, which has the same methods."""

    def __init__(self, thresholds: Array, device: Device) -> None:
        self._thresholds = thresholds
        self._device = device

    def first(self, end: int) -> int:
        """The first column of the block."""
        return max(0, end - BLOCK_COLUMNS)

    def round(self, left: Array, reach: Array, end: int) -> Array:
        """Round a block; its rows of `left` are overwritten."""
        (integers,) = self._device.run(round_columns, left[self.first(end) : end], reach, self._thresholds)
        return integers


def _fit_rows(integers: Array, row_scale: Array, column_scale: Array, moments: Array, wanted: Array) -> Array:
    """Fit the scales of rows by least squares. Scales are float64, other arrays float32."""
    xp = functions(integers)
    scaled = integers * single(column_scale)
    energies = xp.sum((scaled @ moments) * scaled, axis=1, dtype=xp.float64)
    matched = xp.sum(scaled * wanted, axis=1, dtype=xp.float64)
    fitted = matched / xp.where(energies > 0, energies, 1.0)
    return xp.where(fitted > 0, fitted, row_scale)


def _fit_columns(integers: Array, row_scale: Array, column_scale: Array, moments: Array, wanted: Array) -> Array:
    """Fit the scales of all columns together by normal equations, with a slight pull towards the present scales."""
    xp = functions(integers)
    scaled = integers * single(row_scale)[:, None]
    normal = double(scaled.T @ scaled)
    normal *= moments
    matched = xp.sum(scaled * wanted, axis=0, dtype=xp.float64)
    ridge = _RIDGE * float(xp.trace(normal)) / len(normal)
    if ridge <= 0:
        return column_scale
    places = np.arange(len(normal))
    normal[places, places] += ridge
    fitted = solve_positive(normal, matched + ridge * column_scale)
    return xp.where(fitted > 0.25 * column_scale, fitted, column_scale)
