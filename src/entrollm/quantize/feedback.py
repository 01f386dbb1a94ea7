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
from entrollm.errors import FormatError
from entrollm.quantize.ecsq import PRICE
from entrollm.quantize.grid import SampledRounding, fit_rounding, grid_choices
from entrollm.quantize.method import CodeChooser, Float32, Quantized, RowSource
from entrollm.quantize.rounding import Rounding
from entrollm.scales import LogScales, octave_codes, short_base, snap

_COLUMN_POWER = 0.5
_ROW_POWER = 0.5
# Columns whose feedback to each other is immediate; what they leave to the others is one matrix product.
_BLOCK_COLUMNS = 64
_SAMPLE_ROWS = 128
_REFINEMENTS = 2
_RIDGE = 1e-6
# A column's gain stays near 1 unless nearly all its integers are 0.
_GAIN_RANGE = (0.7, 1.4)
# Leaves room for a grid that is moved.
_LARGEST_SYMBOL = 112
_TINY = float(np.finfo(np.float32).tiny)


@dataclass(frozen=True)
class FeedbackQuantizer:
    """Successive quantization with scales per row and per column. Works on a whole matrix in float32 at a time.

    Attributes:
        step: relative to the RMS of the matrix times that of its inputs; larger is coarser.
        factor: float32, shape (columns, columns); see `Statistics.factor`.
        row_precision: float32, shape (rows,), divides the steps of rows that matter more; None for all alike.
        price: what a bit is worth in rounding, in squared steps.
        fits_code: whether the grid may move to where it suits a prefix code.
    """

    step: float
    factor: Float32
    row_precision: Float32 | None = None
    price: float = PRICE
    fits_code: bool = True

    def quantize(self, source: RowSource, choose: CodeChooser) -> Quantized:
        """Quantize a matrix.

        Raises:
            FormatError: a weight is not finite.
        """
        weights = read_finite(source)
        row_steps, column_steps = self._steps(weights)
        stretch, rounding = self._rounding(weights, row_steps, column_steps, choose)
        grids = self._grids(row_steps, column_steps * np.float32(stretch))
        steps = grids[0].values(), grids[1].values()
        integers, gains = feed_back(weights, self.factor, steps, rounding, fit_gains=True)
        rows, columns = self._refine(weights, integers, grids, gains)
        symbols = np.rint(integers + np.float32(rounding.zero)).astype(np.uint8)
        integers *= rows.values()[:, np.newaxis]
        integers *= columns.values()
        integers -= weights
        return Quantized(
            symbols=symbols,
            counts=_core.histogram(symbols),
            grid=f"feedback-{self.step:.4g}",
            scale=rows if len(rows) > 1 else rows.values(),
            error=float(np.square(integers, dtype=np.float64).sum()),
            energy=float(np.square(weights, dtype=np.float64).sum()),
            zero=rounding.zero,
            column_scale=columns,
        )

    def _steps(self, weights: Float32) -> tuple[Float32, Float32]:
        """Steps by row, around 1, and by column; their product is the step of a weight."""
        diagonal = np.diag(self.factor).astype(np.float64)
        inputs = math.sqrt(float(np.square(self.factor, dtype=np.float64).sum()) / len(diagonal))
        sizes = np.sqrt(np.square(weights, dtype=np.float64).mean(axis=1))
        whole = math.sqrt(float(np.square(sizes).mean()))
        if whole == 0.0:
            return np.ones(len(weights), np.float32), np.ones(len(diagonal), np.float32)
        typical = float(np.exp(np.log(diagonal).mean()))
        exact = self.step * whole * inputs / typical * (diagonal / typical) ** -_COLUMN_POWER
        columns: Float32 = exact.astype(np.float32)
        rows = np.where(sizes > 0, sizes / whole, 1.0) ** _ROW_POWER
        if self.row_precision is not None:
            rows = rows / self.row_precision
        widest = np.abs(weights / columns).max(axis=1) / _LARGEST_SYMBOL
        return np.maximum(rows, widest).astype(np.float32), columns

    def _rounding(
        self, weights: Float32, row_steps: Float32, column_steps: Float32, choose: CodeChooser
    ) -> tuple[float, Rounding]:
        """What steps are multiplied by, and rounding by the code lengths that a sample of the rows would get."""
        if self.price <= 0:
            return 1.0, Rounding()
        picked = slice(None, None, max(1, len(weights) // _SAMPLE_ROWS))
        sample = SampledRounding()
        feed_back(weights[picked], self.factor, (row_steps[picked], column_steps), sample)
        choices = grid_choices(fits_code=self.fits_code, keeps_zero=not weights.any(axis=1).all())
        grid, rounding = fit_rounding(sample.rows(), self.price, choose, choices)
        return grid.stretch, rounding

    def _grids(self, row_steps: Float32, column_steps: Float32) -> tuple[LogScales, LogScales]:
        """The steps as they can be stored; those of columns are around 1, and those of rows make up for it."""
        typical = np.float32(np.exp(np.log(column_steps.astype(np.float64)).mean()))
        rows = snap(row_steps * typical, octave_codes(len(column_steps), self.step))
        return rows, snap(column_steps / typical, octave_codes(len(row_steps), self.step), 1.0)

    def _refine(
        self, weights: Float32, integers: Float32, grids: tuple[LogScales, LogScales], gains: Float32
    ) -> tuple[LogScales, LogScales]:
        """Alternate least squares for row and column scales under the output error, on the grids of the steps."""
        rows, columns = grids
        moments = (self.factor @ self.factor.T).astype(np.float64)
        wanted = weights @ moments.astype(np.float32)
        row_scale = rows.values().astype(np.float64)
        column_scale = (columns.values() * gains).astype(np.float64)
        for _ in range(_REFINEMENTS):
            column_scale = _fit_columns(integers, row_scale, column_scale, moments, wanted)
            row_scale = _fit_rows(integers, row_scale, column_scale, moments, wanted)
        # What all columns moved by is left to the rows, and to the base of their codes.
        typical = float(np.exp(np.log(column_scale / columns.values()).mean()))
        columns = snap(column_scale / typical, columns.per_octave, columns.base)
        row_scale = _fit_rows(integers, row_scale * typical, columns.values().astype(np.float64), moments, wanted)
        moved = float(np.exp(np.log(row_scale / rows.values()).mean()))
        return snap(row_scale, rows.per_octave, short_base(rows.base * moved)), columns


def read_finite(source: RowSource) -> Float32:
    """A whole matrix in float32.

    Raises:
        FormatError: a weight is not finite.
    """
    weights = source.read(0, source.shape[0]).astype(np.float32)
    if not np.isfinite(weights).all():
        row, column = (int(i) for i in np.argwhere(~np.isfinite(weights))[0])
        raise FormatError(f"tensor {source.name!r} has {weights[row, column]} at [{row}, {column}]; it must be finite")
    return weights


def feed_back(
    weights: Float32,
    factor: Float32,
    steps: tuple[Float32, Float32],
    rounding: Rounding,
    *,
    fit_gains: bool = False,
) -> tuple[Float32, Float32]:
    """Round all columns, the last one first, each taking up the errors of those before.

    Args:
        weights: float32, shape (rows, columns).
        factor: float32, shape (columns, columns), lower triangle.
        steps: by row and by column; their product is the step of a weight.
        rounding: how a number becomes an integer.
        fit_gains: correct the step of each column by least squares once it is rounded.
    Returns:
        The integers in float32, and the gain of each column.
    """
    row_steps, column_steps = steps
    left = weights @ factor
    integers = np.empty_like(weights)
    gains = np.ones(weights.shape[1], np.float32)
    row_energy = np.square(row_steps)
    for end in range(weights.shape[1], 0, -_BLOCK_COLUMNS):
        begin = max(0, end - _BLOCK_COLUMNS)
        chosen = np.empty((len(weights), end - begin), np.float32)
        for i in range(end - 1, begin - 1, -1):
            scaled = left[:, i] / (column_steps[i] * factor[i, i] * row_steps)
            rounded = rounding.symbols(scaled).astype(np.float32) - np.float32(rounding.zero)
            energy = float(np.dot(np.square(rounded), row_energy))
            if fit_gains and energy > 0:
                fitted = float(np.dot(rounded * row_energy, scaled)) / energy
                gains[i] = min(_GAIN_RANGE[1], max(_GAIN_RANGE[0], fitted))
            integers[:, i] = rounded
            chosen[:, i - begin] = rounded * row_steps * (column_steps[i] * gains[i])
            left[:, begin : i + 1] -= np.outer(chosen[:, i - begin], factor[i, begin : i + 1])
        if begin:
            left[:, :begin] -= chosen @ factor[begin:end, :begin]
    return integers, gains


def _fit_rows(
    integers: Float32,
    row_scale: NDArray[np.float64],
    column_scale: NDArray[np.float64],
    moments: NDArray[np.float64],
    wanted: Float32,
) -> NDArray[np.float64]:
    scaled = integers * column_scale.astype(np.float32)
    energy = np.einsum("ij,ij->i", scaled @ moments.astype(np.float32), scaled, dtype=np.float64)
    matched = np.einsum("ij,ij->i", scaled, wanted, dtype=np.float64)
    fitted = np.divide(matched, energy, out=row_scale.copy(), where=energy > 0)
    return np.where(fitted > 0, fitted, row_scale)


def _fit_columns(
    integers: Float32,
    row_scale: NDArray[np.float64],
    column_scale: NDArray[np.float64],
    moments: NDArray[np.float64],
    wanted: Float32,
) -> NDArray[np.float64]:
    """Normal equations of all columns together, drawn slightly to the present scales."""
    scaled = integers * row_scale.astype(np.float32)[:, np.newaxis]
    normal = (scaled.T @ scaled).astype(np.float64) * moments
    matched = np.einsum("ij,ij->j", scaled, wanted, dtype=np.float64)
    ridge = _RIDGE * float(np.trace(normal)) / len(normal)
    if ridge <= 0:
        return column_scale
    normal[np.diag_indices(len(normal))] += ridge
    fitted: NDArray[np.float64] = np.linalg.solve(normal, matched + ridge * column_scale)
    return np.where(fitted > 0.25 * column_scale, fitted, column_scale)
