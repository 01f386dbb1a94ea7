"""Scales on a logarithmic grid: one byte each, a fraction of an octave apart."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from entrollm.format.grid import OCTAVE_CODES

MIDDLE = 128
"""The code of the base."""
# Decimal digits of a base: its value is free, and short ones take little room in a header.
_BASE_DIGITS = 4


@dataclass(frozen=True)
class LogScales:
    """Positive scales base * 2^((code - 128) / per_octave).

    Attributes:
        codes: uint8, shape (n,).
        per_octave: codes in an octave, one of OCTAVE_CODES.
        base: finite in float32.
    """

    codes: NDArray[np.uint8]
    per_octave: int
    base: float = 1.0

    def values(self) -> NDArray[np.float32]:
        """The scales: float32, shape (n,)."""
        return decode_scales(self.codes, self.per_octave, self.base)

    def nearest(self, values: NDArray[np.floating[Any]]) -> LogScales:
        """The nearest scales on the same grid; values beyond its ends go there."""
        places = np.rint(_octaves(values, self.base) * self.per_octave) + MIDDLE
        return LogScales(np.clip(places, 0, 255).astype(np.uint8), self.per_octave, self.base)

    def __len__(self) -> int:
        return len(self.codes)


def float_scales(scales: NDArray[Any] | LogScales) -> NDArray[np.float32]:
    """What scales are, stored as numbers or as codes: float32, shape (n,)."""
    return scales.values() if isinstance(scales, LogScales) else scales.astype(np.float32)


def zero_offsets(scale: NDArray[np.float32], zero: float) -> NDArray[np.float32]:
    """What is added to scale * symbol so that `zero` stands for 0; infinite beyond float32's range."""
    with np.errstate(over="ignore"):
        offsets: NDArray[np.float32] = scale * np.float32(-zero)
    return offsets


def decode_scales(codes: NDArray[np.uint8], per_octave: int, base: float) -> NDArray[np.float32]:
    """What codes stand for: base * 2^((code - 128) / per_octave), both factors and their product in float32."""
    place = codes.astype(np.int32) - MIDDLE
    # These 64 powers are far from the middle between two floats: every exp2 rounds to the same ones.
    fractions = np.exp2(np.arange(per_octave) / per_octave).astype(np.float32)
    powers = np.ldexp(fractions[place % per_octave], place // per_octave)
    with np.errstate(over="ignore", under="ignore"):
        scaled: NDArray[np.float32] = powers.astype(np.float32) * np.float32(base)
    return scaled


def snap(values: NDArray[np.floating[Any]], finest: int, base: float | None = None) -> LogScales:
    """The nearest scales on a grid, whose base is in the middle of the values unless it is given.

    Args:
        values: positive and finite, shape (n,).
        finest: codes in an octave, one of OCTAVE_CODES; fewer where the values span more octaves than a byte can.
        base: what code 128 stands for.
    """
    if base is None:
        base = short_base(math.sqrt(float(values.min())) * math.sqrt(float(values.max())))
    octaves = _octaves(values, base)
    fits = [n for n in OCTAVE_CODES if n <= finest and octaves.min() * n >= -MIDDLE and octaves.max() * n <= 127]
    return LogScales(np.zeros(0, np.uint8), max(fits, default=1), base).nearest(values)


def _octaves(values: NDArray[np.floating[Any]], base: float) -> NDArray[np.float64]:
    octaves: NDArray[np.float64] = np.log2(values.astype(np.float64)) - math.log2(base)
    return octaves


def octave_codes(weights: int, step: float, is_fine: bool = False) -> int:
    """The codes in an octave at which a scale costs least, in its own bits and in the error that it leaves.

    Of n codes, one more bit is paid for once in `weights` weights, and the scale is off by up to half a code, whose
    square weighs against that of the rounding, step^2 / 12.

    Args:
        weights: how many the scale belongs to.
        step: of the grid, over the RMS of the weights.
        is_fine: four times as many, so that tuning can move scales by a percent.
    """
    best = math.log(2) * math.sqrt(weights) / max(step, 1e-6) * (4 if is_fine else 1)
    return min(OCTAVE_CODES, key=lambda n: abs(math.log2(n / best)))


def short_base(value: float) -> float:
    """A number of few digits close to a positive one."""
    return float(f"{value:.{_BASE_DIGITS}g}")
