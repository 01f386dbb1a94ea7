"""GPTQ (arXiv 2210.17323) on entropy-coded grids: a step per row, rounding to the nearest, errors fed back.

It shares the successive rounding of feedback.py. It has neither steps and scales of columns nor rounding by code
length, which feedback.py adds for the sake of the code.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import ml_dtypes
import numpy as np

from entrollm import _core
from entrollm.arrays import HOST, Array, Device, like
from entrollm.quantize.feedback import energy, feed_back, read_finite, row_maxima, row_sizes, to_symbols
from entrollm.quantize.method import CodeChooser, Float32, Quantized, RowSource
from entrollm.quantize.rounding import ZERO, Rounding

_LARGEST_SYMBOL = 255 - ZERO


@dataclass(frozen=True)
class GptqQuantizer:
    """Successive quantization with one grid per row. It holds a whole matrix in float32.

    Attributes:
        step: the step of the grid over the RMS of the matrix. The step of a row is in proportion to the square root of
            its RMS.
        factor: float32, shape (columns, columns), on the device; see `Statistics.factor`.
        row_precision: float32, shape (rows,), what the steps of the rows are divided by; None if all rows are alike.
        device: the device that computes.
    """

    step: float
    factor: Array
    row_precision: Float32 | None = None
    device: Device = HOST

    def quantize(self, source: RowSource, choose: CodeChooser) -> Quantized:
        """Quantize a matrix.

        Raises:
            FormatError: a weight is not finite.
        """
        weights = read_finite(source, self.device)
        scale = self._row_steps(weights).astype(ml_dtypes.bfloat16)
        steps = self.device.put(scale), like(weights, np.ones(weights.shape[1], np.float32))
        integers = feed_back(weights, self.factor, steps, Rounding(), self.device)
        symbols = to_symbols(integers, self.device)
        integers *= steps[0][:, None]
        return Quantized(
            symbols=symbols,
            counts=_core.histogram(symbols),
            grid=f"gptq-{self.step:.4g}",
            scale=scale if len(scale) > 1 else scale.astype(np.float32),
            error=energy(integers - weights),
            energy=energy(weights),
            zero=ZERO,
        )

    def _row_steps(self, weights: Array) -> Float32:
        sizes = row_sizes(weights, self.device)
        whole = math.sqrt(float(np.square(sizes).mean()))
        if whole == 0.0:
            return np.ones(len(weights), np.float32)
        steps = self.step * np.sqrt(np.where(sizes > 0, sizes, whole) * whole)
        if self.row_precision is not None:
            steps /= self.row_precision
        steps = np.maximum(steps, self.device.take(row_maxima(weights)) / _LARGEST_SYMBOL)
        exact: Float32 = steps.astype(np.float32)
        return exact
