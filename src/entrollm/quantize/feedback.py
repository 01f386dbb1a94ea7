"""Calibrated quantization with error feedback, column by column.

The error of a matrix that matters is that of its outputs, tr(E H E^T) with H = E[x x^T] the second moments of its
inputs. With H = L L^T it is the squared norm of (W - What) L, and since L is triangular, columns can be rounded one
after another, each taking up what the later ones left (GPTQ, arXiv 2210.17323). For a given rate the best steps are
inversely proportional to the diagonal of L and every column is rescaled by least squares (WaterSIC,
arXiv 2603.04956). That holds for a code per column; here one code serves a whole matrix, so steps go half way, as for
rows in ecsq.py.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from entrollm import _core
from entrollm.arrays import HOST, Array, Device, double, functions, like, single
from entrollm.errors import FormatError
from entrollm.format.log_scales import LogScales, octave_codes, short_base, snap
from entrollm.quantize.ecsq import PRICE
from entrollm.quantize.grid import PLAIN_GRID, Grid, fit_grid, fit_rounding, grid_choices
from entrollm.quantize.method import CodeChooser, Float32, Quantized, RowSource
from entrollm.quantize.rounding import ZERO, Rounding, to_integers

_COLUMN_POWER = 0.5
_ROW_POWER = 0.5
# Columns whose feedback to each other is immediate; what they leave to the others is one matrix product.
_BLOCK_COLUMNS = 64
_SAMPLE_ROWS = 128
_REFINEMENTS = 2
_RIDGE = 1e-6
# Leaves room for a grid that is moved, and for steps that are rounded down.
_LARGEST_SYMBOL = 112


@dataclass(frozen=True)
class FeedbackQuantizer:
    """Successive quantization with scales per row and per column. Works on a whole matrix in float32 at a time.

    Attributes:
        step: relative to the RMS of the matrix times that of its inputs; larger is coarser.
        factor: float32, shape (columns, columns), on the device; see `Statistics.factor`.
        row_precision: float32, shape (rows,), divides the steps of rows that matter more; None for all alike.
        price: what a bit is worth in rounding, in squared steps.
        fits_code: whether the grid may move to where it suits a prefix code.
        fine_scales: whether scales have room for tuning.
        device: what computes.
        correction: float32, shape (rows, columns), on the device, what is added to the weights first; None for
            nothing. Errors are counted from the weights as they were.
        is_draft: only the histogram of the integers is wanted, so scales are not fitted.
    """

    step: float
    factor: Array
    row_precision: Float32 | None = None
    price: float = PRICE
    fits_code: bool = True
    fine_scales: bool = False
    device: Device = HOST
    correction: Array | None = None
    is_draft: bool = False

    def quantize(self, source: RowSource, choose: CodeChooser) -> Quantized:
        """Quantize a matrix.

        Raises:
            FormatError: a weight is not finite.
        """
        weights = read_finite(source, self.device)
        wanted = weights if self.correction is None else weights + self.correction
        steps = self._steps(wanted)
        grid, rounding = self._rounding(wanted, steps, choose)
        rows, columns = self._stored(steps[0], steps[1] * grid.stretch)
        steps = self.device.put(rows.values()), self.device.put(columns.values())
        # On a grid beside 0, integers stand for what is left of the weights; all of it is gone after the rounding.
        left = wanted - grid.shift * steps[0][:, None] * steps[1] if grid.shift else wanted
        integers = feed_back(left, self.factor, steps, rounding, self.device)
        symbols = to_symbols(integers, self.device)
        integers += grid.shift
        if not self.is_draft:
            rows, columns = self._refine(wanted, integers, rows, columns)
        integers *= self.device.put(rows.values())[:, None]
        integers *= self.device.put(columns.values())
        return Quantized(
            symbols=symbols,
            counts=_core.histogram(symbols),
            grid=f"feedback-{self.step:.4g}",
            scale=rows if len(rows) > 1 else rows.values(),
            error=energy(integers - weights),
            energy=energy(weights),
            zero=ZERO - grid.shift,
            column_scale=columns,
        )

    def _steps(self, weights: Array) -> tuple[Array, Array]:
        """Steps by row, around 1, and by column; their product is the step of a weight."""
        take = self.device.take
        diagonal = take(functions(self.factor).diagonal(self.factor)).astype(np.float64)
        inputs = math.sqrt(energy(self.factor) / len(diagonal))
        sizes = row_sizes(weights, self.device)
        whole = math.sqrt(float(np.square(sizes).mean()))
        if whole == 0.0:
            rows, columns = np.ones(len(weights), np.float32), np.ones(len(diagonal), np.float32)
            return like(weights, rows), like(weights, columns)
        typical = float(np.exp(np.log(diagonal).mean()))
        by_column = self.step * whole * inputs / typical * (diagonal / typical) ** -_COLUMN_POWER
        column_steps = like(weights, by_column.astype(np.float32))
        by_row = np.where(sizes > 0, sizes / whole, 1.0) ** _ROW_POWER
        if self.row_precision is not None:
            by_row /= self.row_precision
        widest = take(row_maxima(weights / column_steps)) / _LARGEST_SYMBOL
        return like(weights, np.maximum(by_row, widest).astype(np.float32)), column_steps

    def _rounding(self, weights: Array, steps: tuple[Array, Array], choose: CodeChooser) -> tuple[Grid, Rounding]:
        """A grid, and rounding by the code lengths that a sample of the rows would get; of a draft, about those."""
        if self.price <= 0:
            return PLAIN_GRID, Rounding()
        keeps_zero = not float(row_maxima(weights).min())
        choices = grid_choices(fits_code=self.fits_code, keeps_zero=keeps_zero)
        if self.is_draft:
            grid = fit_grid(self.device.take(weights / steps[0][:, None] / steps[1]), self.price, choices)
            return grid, Rounding(grid.lengths, self.price)
        picked = slice(None, None, max(1, len(weights) // _SAMPLE_ROWS))
        sample, row_steps = weights[picked], steps[0][picked][:, None]
        integers = feed_back(sample, self.factor, (steps[0][picked], steps[1]), Rounding(), self.device)
        # What was rounded: the integers and the errors that they left, in units of the steps.
        errors = (sample - integers * row_steps * steps[1]) @ self.factor
        rounded = integers + errors / row_steps / (steps[1] * functions(errors).diagonal(self.factor))
        return fit_rounding(self.device.take(rounded), self.price, choose, choices)

    def _stored(self, row_steps: Array, column_steps: Array) -> tuple[LogScales, LogScales]:
        """The steps as they can be stored; those of columns are around 1, and those of rows make up for it."""
        by_row, by_column = (self.device.take(steps).astype(np.float64) for steps in (row_steps, column_steps))
        typical = float(np.exp(np.log(by_column).mean()))
        rows = snap(by_row * typical, octave_codes(len(by_column), self.step, self.fine_scales))
        return rows, snap(by_column / typical, octave_codes(len(by_row), self.step, self.fine_scales), 1.0)

    def _refine(
        self, weights: Array, integers: Array, rows: LogScales, columns: LogScales
    ) -> tuple[LogScales, LogScales]:
        """Alternate least squares for row and column scales under the output error, on the grids of the steps."""
        put, take = self.device.put, self.device.take
        moments = self.factor @ self.factor.T
        wanted = weights @ moments
        row_scale, column_scale = double(put(rows.values())), double(put(columns.values()))
        for _ in range(_REFINEMENTS):
            column_scale = _fit_columns(integers, row_scale, column_scale, moments, wanted)
            row_scale = _fit_rows(integers, row_scale, column_scale, moments, wanted)
        # What all columns moved by is left to the rows, and to the base of their codes.
        fitted = take(column_scale)
        typical = float(np.exp(np.log(fitted / columns.values()).mean()))
        columns = snap(fitted / typical, columns.per_octave, columns.base)
        row_scale = _fit_rows(integers, row_scale * typical, double(put(columns.values())), moments, wanted)
        fitted = take(row_scale)
        moved = float(np.exp(np.log(fitted / rows.values()).mean()))
        return snap(fitted, rows.per_octave, short_base(rows.base * moved)), columns


def read_finite(source: RowSource, device: Device = HOST) -> Array:
    """A whole matrix in float32.

    Raises:
        FormatError: a weight is not finite.
    """
    weights = device.put(source.read(0, source.shape[0]))
    if not functions(weights).isfinite(weights).all():
        found = device.take(weights)
        row, column = (int(i) for i in np.argwhere(~np.isfinite(found))[0])
        raise FormatError(f"tensor {source.name!r} has {found[row, column]} at [{row}, {column}]; it must be finite")
    return weights


def to_symbols(integers: Array, device: Device) -> NDArray[np.uint8]:
    """The symbols of integers around 0, in the order of rows."""
    xp = functions(integers)
    symbols: NDArray[np.uint8] = device.take(xp.asarray(integers + float(ZERO), dtype=xp.uint8))
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
    weights: Array, factor: Array, steps: tuple[Array, Array], rounding: Rounding, device: Device = HOST
) -> Array:
    """Round all columns, the last one first, each taking up the errors of those before.

    Args:
        weights: float32, shape (rows, columns).
        factor: float32, shape (columns, columns), lower triangle.
        steps: by row and by column; their product is the step of a weight.
        rounding: how a number becomes an integer.
        device: where the arrays are.
    Returns:
        The integers in float32.
    """
    row_steps, column_steps = steps
    units = column_steps * functions(weights).diagonal(factor)
    # What is left of the columns, in units of the steps, each in a row of its own.
    left = factor.T @ (weights / row_steps[:, None]).T
    left /= units[:, None]
    integers = functions(weights).empty_like(left)
    thresholds = like(left, rounding.thresholds)
    for end in range(len(left), 0, -_BLOCK_COLUMNS):
        block = slice(max(0, end - _BLOCK_COLUMNS), end)
        # How far a column's integers of 1 reach into the columns before it.
        reach = factor[block, :end] * column_steps[block, None] / units[:end]
        (integers[block],) = device.run(_round, left[block], reach[:, block], thresholds)
        if block.start:
            left[: block.start] -= reach[:, : block.start].T @ integers[block]
    return integers.T


def _round(left: Array, reach: Array, thresholds: Array) -> tuple[Array]:
    """Round the rows of a block, the last one first.

    Args:
        left: float32 (block, n), in units of the steps; changed.
        reach: float32 (block, block).
        thresholds: see `to_integers`.
    Returns:
        integers, float32 (block, n).
    """
    integers = functions(left).empty_like(left)
    for i in range(len(left) - 1, -1, -1):
        integers[i] = to_integers(left[i], thresholds)
        left[:i] -= reach[i, :i, None] * integers[i]
    return (integers,)


def _fit_rows(integers: Array, row_scale: Array, column_scale: Array, moments: Array, wanted: Array) -> Array:
    """Scales of rows by least squares: all scales in float64, the others in float32."""
    xp = functions(integers)
    scaled = integers * single(column_scale)
    energies = xp.sum((scaled @ moments) * scaled, axis=1, dtype=xp.float64)
    matched = xp.sum(scaled * wanted, axis=1, dtype=xp.float64)
    fitted = matched / xp.where(energies > 0, energies, 1.0)
    return xp.where(fitted > 0, fitted, row_scale)


def _fit_columns(integers: Array, row_scale: Array, column_scale: Array, moments: Array, wanted: Array) -> Array:
    """Normal equations of all columns together, drawn slightly to the present scales."""
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
    fitted = xp.linalg.solve(normal, matched + ridge * column_scale)
    return xp.where(fitted > 0.25 * column_scale, fitted, column_scale)
