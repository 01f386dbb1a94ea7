"""Predict the size of a matrix at any step from a sample of its rows."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from entrollm.codec.blocks import choose_blocks
from entrollm.codec.choose import Prefer, choose_code, is_flat_preferred, stored_bits
from entrollm.codec.cost import Processor
from entrollm.codec.flat import sampled_bits
from entrollm.codec.huffman import entropy_bits
from entrollm.format import layout
from entrollm.format.blocks import block_count, padded
from entrollm.format.entry import ROOM_BYTES
from entrollm.format.flat import AnyCode, FlatCode
from entrollm.format.grid import GridKind
from entrollm.format.log_scales import LogScales
from entrollm.format.spec import TensorSpec
from entrollm.quantize.method import CodeChooser, Quantized, Scales

# The ratio of neighbouring steps that are measured. Between them bits are nearly linear in the log of the step, less so
# for flat codes, whose bits fall unevenly.
_RATIO = 1.35
_FLAT_RATIO = 1.16
# Steps from which `best_step` chooses lie this many ratios around the nominal step: by a factor of 1.8 either way.
_CHOICES = 4
# A step of this size has no patch that matters.
_FINE_STEP = 0.05
# What a bit per weight is worth, over the error of the nominal step: at high rates, errors are in proportion to the
# square of the step, and bits fall by the logarithm of the step.
_BIT_WORTH = 2 * math.log(2)
# Deflated sizes of the patches of a row.
_ROW_BYTES = 0.8
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
        prefer, processor: how codes are chosen.
    """

    def __init__(
        self,
        name: str,
        shape: tuple[int, int],
        sample: Callable[[float, CodeChooser], Quantized],
        prefer: Prefer,
        processor: Processor = "x86",
    ) -> None:
        self.name = name
        self.shape = shape
        self._sample = sample
        self._prefer: Prefer = prefer
        self._processor: Processor = processor
        self._ratio = _FLAT_RATIO if is_flat_preferred(prefer, processor) else _RATIO
        self._points: dict[int, RatePoint] = {}

    @property
    def weights(self) -> int:
        """Weights of the matrix."""
        return self.shape[0] * self.shape[1]

    def at(self, step: float) -> RatePoint:
        """The prediction at a step, interpolated between two measured steps."""
        position = math.log(step) / math.log(self._ratio)
        below = math.floor(position)
        share = position - below
        low, high = self._point(below), self._point(below + 1)
        error = math.exp((1 - share) * _log(low.error) + share * _log(high.error))
        return RatePoint((1 - share) * low.stored_bytes + share * high.stored_bytes, error)

    def best_step(self, nominal: float) -> float:
        """The step with the least cost of bits and errors together, where a smooth curve would have the nominal one.

        Errors of flat codes grow with the step as smoothly as those of others, but bits fall unevenly, by about one
        between steps at which patches are few.
        """
        fine = self.at(_FINE_STEP).error / _FINE_STEP**2 or 1.0
        nearest = round(math.log(nominal) / math.log(self._ratio))

        def cost(index: int) -> float:
            point = self._point(index)
            bits = point.stored_bytes * 8 / self.weights
            return bits * _BIT_WORTH + point.error / (fine * nominal**2)

        return self._ratio ** min(range(nearest - _CHOICES, nearest + _CHOICES + 1), key=cost)

    def _point(self, index: int) -> RatePoint:
        if index not in self._points:
            self._points[index] = self._measure(self._ratio**index)
        return self._points[index]

    def _measure(self, step: float) -> RatePoint:
        rows, columns = self.shape
        blocks = choose_blocks(rows, columns)
        count = block_count(rows, columns, blocks)

        def choose(counts: Sequence[int]) -> AnyCode:
            # Counts are scaled to the whole matrix, because fixed costs affect the choice between codes.
            factor = self.weights / max(1, sum(counts))
            return choose_code([math.ceil(c * factor) for c in counts], count, self._prefer, self._processor)

        quantized = self._sample(step, choose)
        factor = self.weights / quantized.symbols.size
        counts = [math.ceil(int(c) * factor) for c in quantized.counts]
        code = choose_code(counts, count, self._prefer, self._processor)
        spec = TensorSpec(rows, columns, "BF16", quantized.grid, code, blocks, GridKind(zero=128), 0.123456789)
        scales = _scale_bytes(quantized.scale, rows)
        if quantized.column_scale is not None:
            scales += _scale_bytes(quantized.column_scale, columns)
        header = _SPEC_SHARE * len(spec.to_json()) + len(self.name) + _ENTRY_BYTES
        side = max(scales, ROOM_BYTES) + layout.ALIGNMENT_BYTES / 2
        # Padding columns hold the cheapest symbol.
        counts[int(np.argmax(counts))] += rows * (padded(columns) - columns)
        if isinstance(code, FlatCode):
            side += _ROW_BYTES * rows
            bits = sampled_bits(quantized.symbols)
        else:
            bits = stored_bits(code, counts, count)
        stored = bits * sum(counts) / 8 + side + header
        return RatePoint(stored, quantized.error / quantized.energy if quantized.energy else 0.0)


def _scale_bytes(scales: Scales, count: int) -> float:
    """Predict the bytes of `count` scales from a sample of them."""
    if isinstance(scales, LogScales):
        return entropy_bits(np.bincount(scales.codes).tolist()) / 8 * count + _DEFLATE_BYTES
    return scales.itemsize * count


def _log(error: float) -> float:
    return math.log(max(error, 1e-30))
