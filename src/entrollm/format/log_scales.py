"""Scales on a logarithmic grid. Each is one byte, a code; neighbouring codes are a fraction of an octave apart."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from entrollm.format.grid import OCTAVE_CODES

MIDDLE = 128
"""The code of the base."""
# Decimal digits of a base. Any value will do, and short ones take little room in a header.
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
        """The nearest scales on the same grid; values beyond an end of the grid become that end."""
        places = np.rint(_octaves(values, self.base) * self.per_octave) + MIDDLE
        return LogScales(np.clip(places, 0, 255).astype(np.uint8), self.per_octave, self.base)

    def __len__(self) -> int:
        return len(self.codes)


def float_scales(scales: NDArray[Any] | LogScales) -> NDArray[np.float32]:
    """The values of scales that are numbers or codes: float32, shape (n,)."""
    return scales.values() if isinstance(scales, LogScales) else scales.astype(np.float32)


def zero_offsets(scale: NDArray[np.float32], zero: float) -> NDArray[np.float32]:
    """The offsets that make the symbol `zero` stand for weight 0; infinite beyond the range of float32."""
    with np.errstate(over="ignore"):
        offsets: NDArray[np.float32] = scale * np.float32(-zero)
    return offsets


def decode_scales(codes: NDArray[np.uint8], per_octave: int, base: float) -> NDArray[np.float32]:
    """The scales that codes stand for: base * 2^((code - 128) / per_octave); factors and product are float32."""
    place = codes.astype(np.int32) - MIDDLE
    # None of these 64 powers is near the middle between two floats, so every exp2 rounds them alike.
    fractions = np.exp2(np.arange(per_octave) / per_octave).astype(np.float32)
    powers = np.ldexp(fractions[place % per_octave], place // per_octave)
    with np.errstate(over="ignore", under="ignore"):
        scaled: NDArray[np.float32] = powers.astype(np.float32) * np.float32(base)
    return scaled


def snap(values: NDArray[np.floating[Any]], finest: int, base: float | None = None) -> LogScales:
    """Round values to the nearest scales on a grid that spans them.

    Args:
        values: positive and finite, shape (n,).
        finest: codes in an octave, one of OCTAVE_CODES; the grid has fewer if a byte could not span the values.
        base: the value of code 128; by default the middle of the values.
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
    """The codes in an octave at which a scale costs least, counting its own bits and the error that it causes.

    Doubling the codes costs one bit for `weights` weights. A scale is off by up to half a code, and the square of that
    adds to the squared error of rounding, step^2 / 12.

    Args:
        weights: how many weights share the scale.
        step: the step of the grid over the RMS of the weights.
        is_fine: use four times as many codes, so that tuning can move scales by one per cent.
    """
    best = math.log(2) * math.sqrt(weights) / max(step, 1e-6) * (4 if is_fine else 1)
    return min(OCTAVE_CODES, key=lambda n: abs(math.log2(n / best)))


def short_base(value: float) -> float:
    """A number of few digits that is close to a positive `value`."""
    return float(f"{value:.{_BASE_DIGITS}g}")
