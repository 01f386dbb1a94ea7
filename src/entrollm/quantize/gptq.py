"""GPTQ (arXiv 2210.17323) on entropy-coded grids: a step per row, rounding to the nearest, errors fed back.

It shares the successive rounding of feedback.py, and leaves out what that adds for the code's sake: steps and scales by
column, and rounding by code length.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import ml_dtypes
import numpy as np

from entrollm import _core
from entrollm.quantize.feedback import feed_back, read_finite
from entrollm.quantize.method import CodeChooser, Float32, Quantized, RowSource
from entrollm.quantize.rounding import ZERO, Rounding

_LARGEST_SYMBOL = 255 - ZERO


@dataclass(frozen=True)
class GptqQuantizer:
    """Successive quantization on one grid per row. Works on a whole matrix in float32 at a time.

    Attributes:
        step: over the RMS of the matrix; larger is coarser. The step of a row is in proportion to the square root of
            its size.
        factor: float32, shape (columns, columns); see `Statistics.factor`.
        row_precision: float32, shape (rows,), divides the steps of rows that matter more; None for all alike.
    """

    step: float
    factor: Float32
    row_precision: Float32 | None = None

    def quantize(self, source: RowSource, choose: CodeChooser) -> Quantized:
        """Quantize a matrix.

        Raises:
            FormatError: a weight is not finite.
        """
        weights = read_finite(source)
        scale = self._row_steps(weights).astype(ml_dtypes.bfloat16)
        steps = scale.astype(np.float32), np.ones(weights.shape[1], np.float32)
        integers, _ = feed_back(weights, self.factor, steps, Rounding())
        symbols = (integers + np.float32(ZERO)).astype(np.uint8)
        integers *= steps[0][:, np.newaxis]
        integers -= weights
        return Quantized(
            symbols=symbols,
            counts=_core.histogram(symbols),
            grid=f"gptq-{self.step:.4g}",
            scale=scale if len(scale) > 1 else steps[0],
            error=float(np.square(integers, dtype=np.float64).sum()),
            energy=float(np.square(weights, dtype=np.float64).sum()),
            zero=ZERO,
        )

    def _row_steps(self, weights: Float32) -> Float32:
        sizes = np.sqrt(np.square(weights, dtype=np.float64).mean(axis=1))
        whole = math.sqrt(float(np.square(sizes).mean()))
        if whole == 0.0:
            return np.ones(len(weights), np.float32)
        steps = self.step * np.sqrt(np.where(sizes > 0, sizes, whole) * whole)
        if self.row_precision is not None:
            steps /= self.row_precision
        steps = np.maximum(steps, np.abs(weights).max(axis=1) / _LARGEST_SYMBOL)
        exact: Float32 = steps.astype(np.float32)
        return exact
