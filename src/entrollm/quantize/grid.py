"""A grid that suits its code: where it lies and how fine it is, of those that are about as good by themselves.

A prefix code wastes what the probabilities of the symbols miss of powers of two. The waste swings with the step and,
since symbols of equal size and opposite sign are equally likely on a grid that holds 0, it is smaller for most grids
that lie otherwise. The distortion hardly minds either, so the grid is taken that wastes least.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from entrollm import _core
from entrollm.codec.huffman import huffman_lengths
from entrollm.codec.lengths import code_lengths
from entrollm.quantize.method import CodeChooser
from entrollm.quantize.rounding import ZERO, Rounding, thresholds_between

Float32 = NDArray[np.float32]
Float64 = NDArray[np.float64]

Choices = tuple[Sequence[float], Sequence[float]]
"""Stretches and shifts to choose from."""
_STRETCHES = (0.94, 0.97, 1.0, 1.03, 1.06)
_SHIFTS = (0.0, 0.125, 0.25, 0.375, 0.5)
_ROUNDS = 2
# Bins of a step, of a histogram that stands for the weights while grids are compared.
_FINE = 64
_EDGE = 129
# The RMS in steps from which, above 4.6 bits, all grids waste about as little.
_WIDE = 6.0
# Weights in a narrow range far from 0 would ask for a line so flat that it meets 0 beyond all symbols.
_STEEPEST = 4.0


@dataclass(frozen=True)
class Grid:
    """Weight x, in steps as they were asked for, is about (symbol - zero) * stretch * gain.

    Attributes:
        stretch: the step to round with.
        shift: symbols stand for integers and this much more.
        lengths: bits of each symbol in the code that a histogram would get.
        gain, zero: the best linear map of symbols to weights; zero is ZERO where there is no shift.
    """

    stretch: float
    shift: float
    lengths: Float64
    gain: float
    zero: float


PLAIN_GRID = Grid(1.0, 0.0, np.zeros(256), 1.0, ZERO)


def grid_choices(*, fits_code: bool, keeps_zero: bool) -> Choices:
    """What a grid may be: where it was asked for, or moved to suit a code, with 0 on it or not."""
    return (_STRETCHES if fits_code else (1.0,), _SHIFTS if fits_code and not keeps_zero else (0.0,))


def fit_rounding(sample: Float32, price: float, choose: CodeChooser, choices: Choices) -> tuple[Grid, Rounding]:
    """A grid for weights that a sample stands for, and rounding by the lengths of the code that they would get.

    Args:
        sample: weights in steps, any shape.
        price: what a bit is worth in rounding, in squared steps.
        choose: the choice of a code.
        choices: what the grid may be.
    """
    grid = fit_grid(sample, price, choices)
    rounding = Rounding(grid.lengths, price, grid.shift)
    counts = _core.histogram(rounding.symbols(sample / np.float32(grid.stretch)))
    return grid, Rounding(code_lengths(choose([int(c) for c in counts])), price, grid.shift)


def fit_grid(sample: Float32, price: float, choices: Choices) -> Grid:
    """The grid of least rate for its distortion."""
    x = _Fine(sample)
    stretches, shifts = choices if x.spread() < _WIDE else ((1.0,), (0.0,))
    tried = [_try(x, stretch, shift, price) for shift in shifts for stretch in stretches]
    return min(tried, key=lambda found: found[0])[1]


class _Fine:
    """Sums of weights, and of their first and second powers, below the edges of fine bins."""

    def __init__(self, sample: Float32) -> None:
        places = np.clip(sample.reshape(-1), -_EDGE, _EDGE)
        bins = np.rint((places + _EDGE) * _FINE).astype(np.int64)
        counts = np.bincount(bins, minlength=2 * _EDGE * _FINE + 1).astype(np.float64)
        centres = np.arange(len(counts)) / _FINE - _EDGE
        self.sums = np.zeros((3, len(counts) + 1))
        for power in range(3):
            np.cumsum(counts * centres**power, out=self.sums[power, 1:])

    def spread(self) -> float:
        """The RMS of the weights."""
        count, _, second = self.sums[:, -1]
        return float(np.sqrt(second / count))

    def between(self, thresholds: Float64) -> Float64:
        """Sums of the weights on either side of thresholds: (3, thresholds + 1)."""
        edges = np.clip(np.ceil((thresholds + _EDGE) * _FINE), 0, self.sums.shape[1] - 1).astype(np.int64)
        inner = np.concatenate(([0], edges, [self.sums.shape[1] - 1]))
        cells: Float64 = np.diff(self.sums[:, inner], axis=1)
        return cells


def _try(x: _Fine, stretch: float, shift: float, price: float) -> tuple[float, Grid]:
    lengths = np.zeros(256)
    values = np.arange(256) - ZERO + shift
    for _ in range(_ROUNDS):
        edges = thresholds_between(lengths, price) + shift
        count, first, second = x.between(edges * stretch)
        present = np.flatnonzero(count)
        found = huffman_lengths(count[present].astype(np.int64).tolist())
        lengths = np.full(256, max(found) + 4.0)
        lengths[present] = found
    total = count.sum()
    symbols = values * stretch
    mean, centre = first.sum() / total, (count * symbols).sum() / total
    spread, matched = (count * symbols**2).sum() / total, (first * symbols).sum() / total
    gain = _gain(matched - mean * centre, spread - centre**2)
    if not shift or not 1 / _STEEPEST <= gain <= _STEEPEST:
        # A grid that holds 0 keeps it.
        mean = centre = 0.0
        gain = _gain(matched, spread)
    error = second.sum() / total - mean**2 - gain * (matched - mean * centre)
    rate = (count * lengths).sum() / total
    zero = ZERO - shift + (centre - mean / gain) / stretch
    return rate + 0.5 * np.log2(max(error, 1e-9)), Grid(stretch, shift, lengths, gain, round(float(zero), 3))


def _gain(matched: float, spread: float) -> float:
    return matched / spread if spread > 0 and matched > 0 else 1.0
