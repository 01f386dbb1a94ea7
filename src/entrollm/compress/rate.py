"""Predict the size of a matrix at any step from a sample of its rows."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from entrollm.codec.blocks import choose_blocks
from entrollm.codec.choose import Prefer, choose_code, stored_bits
from entrollm.codec.huffman import entropy_bits
from entrollm.format import layout
from entrollm.format.blocks import block_count, padded
from entrollm.format.code import Code
from entrollm.format.entry import ROOM_BYTES
from entrollm.format.grid import GridKind
from entrollm.format.log_scales import LogScales
from entrollm.format.spec import TensorSpec
from entrollm.quantize.method import CodeChooser, Quantized, Scales

# The ratio of neighbouring steps that are measured. Between them bits are nearly linear in the log of the step.
_RATIO = 1.35
# Bytes of an entry's item in the header, and the share that deflating leaves of a spec that resembles those before.
_ENTRY_BYTES = 75
_SPEC_SHARE = 0.15
_DEFLATE_BYTES = 40


@dataclass(frozen=True, slots=True)
class RatePoint:
    """A matrix at one step.

    Attributes:
        stored_bytes: what it takes in the file, its share of the header included.
        error: squared error over the squares of the weights.
    """

    stored_bytes: float
    error: float


class RateCurve:
    """Size and error of one matrix as functions of the step. Points are measured when they are first needed.

    Args:
        name, shape: the matrix.
        sample: quantizes a sample of its rows at a step, given the choice of a code for the whole matrix.
        prefer: how codes are chosen.
    """

    def __init__(
        self,
        name: str,
        shape: tuple[int, int],
        sample: Callable[[float, CodeChooser], Quantized],
        prefer: Prefer,
    ) -> None:
        self.name = name
        self.shape = shape
        self._sample = sample
        self._prefer = prefer
        self._points: dict[int, RatePoint] = {}

    @property
    def weights(self) -> int:
        """Weights of the matrix."""
        return self.shape[0] * self.shape[1]

    def at(self, step: float) -> RatePoint:
        """The prediction at a step, interpolated between two measured steps."""
        position = math.log(step) / math.log(_RATIO)
        below = math.floor(position)
        share = position - below
        low, high = self._point(below), self._point(below + 1)
        error = math.exp((1 - share) * _log(low.error) + share * _log(high.error))
        return RatePoint((1 - share) * low.stored_bytes + share * high.stored_bytes, error)

    def _point(self, index: int) -> RatePoint:
        if index not in self._points:
            self._points[index] = self._measure(_RATIO**index)
        return self._points[index]

    def _measure(self, step: float) -> RatePoint:
        rows, columns = self.shape
        blocks = choose_blocks(rows, columns)
        count = block_count(rows, columns, blocks)

        def choose(counts: Sequence[int]) -> Code:
            # Counts are scaled to the whole matrix, because fixed costs affect the choice between codes.
            factor = self.weights / max(1, sum(counts))
            return choose_code([math.ceil(c * factor) for c in counts], count, self._prefer)

        quantized = self._sample(step, choose)
        factor = self.weights / quantized.symbols.size
        counts = [math.ceil(int(c) * factor) for c in quantized.counts]
        code = choose_code(counts, count, self._prefer)
        spec = TensorSpec(rows, columns, "BF16", quantized.grid, code, blocks, GridKind(zero=128), 0.123456789)
        scales = _scale_bytes(quantized.scale, rows)
        if quantized.column_scale is not None:
            scales += _scale_bytes(quantized.column_scale, columns)
        header = _SPEC_SHARE * len(spec.to_json()) + len(self.name) + _ENTRY_BYTES
        side = max(scales, ROOM_BYTES) + layout.ALIGNMENT_BYTES / 2
        # Padding columns hold the cheapest symbol.
        counts[int(np.argmax(counts))] += rows * (padded(columns) - columns)
        stored = stored_bits(code, counts, count) * sum(counts) / 8 + side + header
        return RatePoint(stored, quantized.error / quantized.energy if quantized.energy else 0.0)


def _scale_bytes(scales: Scales, count: int) -> float:
    """Predict the bytes of `count` scales from a sample of them."""
    if isinstance(scales, LogScales):
        return entropy_bits(np.bincount(scales.codes).tolist()) / 8 * count + _DEFLATE_BYTES
    return scales.itemsize * count


def _log(error: float) -> float:
    return math.log(max(error, 1e-30))
