"""Choose the grid that suits its prefix code best, among grids of about the same distortion.

A prefix code wastes bits because the probabilities of symbols are not powers of two. The waste depends on the step. It
also depends on the shift of the grid: on a grid that holds 0, symbols of equal size and opposite sign are equally
likely, and most shifted grids waste less. Neither changes the distortion much, so the grid with the least waste wins.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from entrollm import _core
from entrollm.codec.flat import best_window
from entrollm.codec.huffman import huffman_lengths
from entrollm.codec.lengths import code_lengths
from entrollm.quantize.method import CodeChooser
from entrollm.quantize.rounding import ZERO, Rounding, thresholds_between
from entrollm.quantize.trellis import TRELLIS_ZERO, TrellisRounding

Float32 = NDArray[np.float32]
Float64 = NDArray[np.float64]

AnyRounding = Rounding | TrellisRounding
CodeFit = Literal["prefix", "flat", "none"]
"""What grids are chosen to suit: a prefix code, a flat code, or nothing."""
_STRETCHES = (0.94, 0.97, 1.0, 1.03, 1.06)
_SHIFTS = (0.0, 0.125, 0.25, 0.375, 0.5)
# An even number of fields fits symbols of both signs if 0 lies between two of them.
_FLAT_SHIFTS = (0.0, 0.5)
# Of the first grid of a trellis. The second lies half a step further, so at the first of these they mirror each other.
_TRELLIS_SHIFTS = (-0.25, -0.125, 0.0)
_ROUNDS = 2
# Grids are compared on a histogram of the weights with this many bins per step, up to this many steps from 0.
_FINE = 64
_EDGE = 129
# From this RMS in steps on, which takes 4.6 bits, all grids waste about equally little.
_WIDE = 6.0
# The steepest gain. Weights in a narrow range far from 0 would need a line so flat that it has no symbol for 0.
_STEEPEST = 4.0


@dataclass(frozen=True)
class Choices:
    """Grids to choose from.

    Attributes:
        stretches, shifts: every pair of these makes a grid.
        lengths: the bits of each symbol, float64 of shape (256,), in the code for a histogram of 256 entries.
        trellis: whether each grid is the first of two that lie half a step apart.
    """

    stretches: Sequence[float]
    shifts: Sequence[float]
    lengths: Callable[[Float64], Float64]
    trellis: bool = False

    @property
    def zero(self) -> int:
        """The symbol of the integer 0."""
        return TRELLIS_ZERO if self.trellis else ZERO

    def rounding(self, lengths: Float64, price: float, shift: float = 0.0) -> AnyRounding:
        """Rounding to a grid, with the bits of each symbol."""
        return (TrellisRounding if self.trellis else Rounding)(lengths, price, shift)


@dataclass(frozen=True)
class Grid:
    """A stretched and shifted grid: a weight, in requested steps, is about (symbol - zero) * stretch * gain.

    With a trellis, the symbol counts half a step more where it lies on the second grid.

    Attributes:
        stretch: the step to round with, in requested steps.
        shift: a symbol stands for its integer plus this.
        lengths: float64, shape (256,), the bits of each symbol in a Huffman code, or a flat one, for the sample.
        gain, zero: the best linear map from symbols to weights; the integer 0 is at zero if there is no shift.
    """

    stretch: float
    shift: float
    lengths: Float64
    gain: float
    zero: float


PLAIN_GRID = Grid(1.0, 0.0, np.zeros(256), 1.0, ZERO)


def grid_choices(*, fits: CodeFit, keeps_zero: bool, trellis: bool = False) -> Choices:
    """The grids to choose from.

    Args:
        fits: what they are to suit.
        keeps_zero: whether the grid must hold 0.
        trellis: whether there is a second grid.
    """
    if trellis:
        # Where the first grid holds 0, symbols of 0 alone never lead to the second.
        return Choices(_STRETCHES, (0.0,) if keeps_zero else _TRELLIS_SHIFTS, _prefix_lengths, trellis)
    if fits == "flat":
        # The steps of flat codes are chosen for each matrix before.
        return Choices((1.0,), (0.0,) if keeps_zero else _FLAT_SHIFTS, _flat_lengths)
    stretches, shifts = (_STRETCHES, _SHIFTS) if fits == "prefix" else ((1.0,), (0.0,))
    return Choices(stretches, (0.0,) if keeps_zero else shifts, _prefix_lengths)


def fit_rounding(sample: Float32, price: float, choose: CodeChooser, choices: Choices) -> tuple[Grid, AnyRounding]:
    """Choose a grid for the weights of a sample, and rounding by the lengths of the code that they would get.

    Args:
        sample: weights in steps, shape (rows, columns).
        price: what a bit is worth in rounding, in squared steps.
        choose: chooses the code.
        choices: the grids to choose from.
    """
    grid = fit_grid(sample, price, choices)
    rounding = choices.rounding(grid.lengths, price, grid.shift)
    counts = [int(c) for c in _core.histogram(rounding.symbols(sample / np.float32(grid.stretch)))]
    return grid, choices.rounding(code_lengths(choose(counts), counts), price, grid.shift)


def fit_grid(sample: Float32, price: float, choices: Choices) -> Grid:
    """The grid with the least rate for its distortion; arguments as for `fit_rounding`."""
    x = _Fine(sample)
    is_wide = x.spread() >= _WIDE
    stretches, shifts = ((1.0,), choices.shifts[:1]) if is_wide else (choices.stretches, choices.shifts)
    tried = [_try(x, stretch, shift, price, choices) for shift in shifts for stretch in stretches]
    return min(tried, key=lambda found: found[0])[1]


class _Fine:
    """Cumulative sums over fine bins: of the number of weights, of the weights, and of their squares."""

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
        """The three sums between neighbouring thresholds, and beyond the outer ones: (3, thresholds + 1)."""
        edges = np.clip(np.ceil((thresholds + _EDGE) * _FINE), 0, self.sums.shape[1] - 1).astype(np.int64)
        inner = np.concatenate(([0], edges, [self.sums.shape[1] - 1]))
        cells: Float64 = np.diff(self.sums[:, inner], axis=1)
        return cells


def _prefix_lengths(count: Float64) -> Float64:
    present = np.flatnonzero(count)
    found = huffman_lengths(count[present].astype(np.int64).tolist())
    lengths = np.full(256, max(found) + 4.0)
    lengths[present] = found
    return lengths


def _flat_lengths(count: Float64) -> Float64:
    return best_window(count)[0].lengths()


def _try(x: _Fine, stretch: float, shift: float, price: float, choices: Choices) -> tuple[float, Grid]:
    # The two grids of a trellis count alike, as if weights were rounded to each of them.
    offsets = shift + np.array([[0.0], [0.5]] if choices.trellis else [[0.0]])
    lengths = np.zeros(256)
    for _ in range(_ROUNDS):
        edges = thresholds_between(lengths, price)
        count, first, second = np.stack([x.between((edges + offset) * stretch) for offset in offsets], axis=1)
        lengths = choices.lengths(count.sum(axis=0))
    total = count.sum()
    symbols = (np.arange(256) - ZERO + offsets) * stretch
    mean, centre = first.sum() / total, (count * symbols).sum() / total
    spread, matched = (count * symbols**2).sum() / total, (first * symbols).sum() / total
    gain = _gain(matched - mean * centre, spread - centre**2)
    if choices.trellis or not shift or not 1 / _STEEPEST <= gain <= _STEEPEST:
        # Without a shift, with an extreme gain or with two grids, the zero symbol stays where it is.
        mean = centre = 0.0
        gain = _gain(matched, spread)
    error = second.sum() / total - mean**2 - gain * (matched - mean * centre)
    rate = (count * lengths).sum() / total
    zero = choices.zero - shift + (centre - mean / gain) / stretch
    lengths = np.roll(lengths, choices.zero - ZERO)
    return rate + 0.5 * np.log2(max(error, 1e-9)), Grid(stretch, shift, lengths, gain, round(float(zero), 3))


def _gain(matched: float, spread: float) -> float:
    return matched / spread if spread > 0 and matched > 0 else 1.0
