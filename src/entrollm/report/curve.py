"""The rate-distortion plot as shapes of an SVG picture, for pages that need no plotting library."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from entrollm.report.rate_distortion import RatePoint

WIDTH, HEIGHT = 720, 420
_LEFT, _RIGHT, _TOP, _BOTTOM = 70, 20, 20, 50


@dataclass(frozen=True, slots=True)
class Tick:
    """A labelled line across the plot, at a pixel."""

    at: float
    label: str


@dataclass(frozen=True, slots=True)
class Mark:
    """A point of the plot, in pixels."""

    x: float
    y: float
    label: str


@dataclass(frozen=True, slots=True)
class Curve:
    """KL divergence over file bits, laid out in pixels of a picture of WIDTH x HEIGHT.

    Attributes:
        x_ticks, y_ticks: of the axes.
        marks: the points, with increasing bits.
    """

    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]
    marks: tuple[Mark, ...]

    @property
    def left(self) -> int:
        """The pixel where the plot begins."""
        return _LEFT

    @property
    def right(self) -> int:
        """The pixel where it ends."""
        return WIDTH - _RIGHT

    @property
    def bottom(self) -> int:
        """The pixel of its lower edge."""
        return HEIGHT - _BOTTOM

    @property
    def path(self) -> str:
        """The line through all marks, as SVG's `points`."""
        return " ".join(f"{mark.x:.1f},{mark.y:.1f}" for mark in self.marks)


def lay_out_curve(points: Sequence[RatePoint]) -> Curve | None:
    """Place the points with a KL above 0 on a linear axis of bits and a logarithmic one of KL; None without any."""
    shown = sorted((point for point in points if point.kl > 0), key=lambda point: point.file_bits)
    if not shown:
        return None
    low, high = math.floor(shown[0].file_bits), math.ceil(shown[-1].file_bits)
    high = max(high, low + 1)
    kls = [math.log10(point.kl) for point in shown]
    bottom, top = math.floor(min(kls)), math.ceil(max(kls))
    top = max(top, bottom + 1)

    def x(bits: float) -> float:
        return _LEFT + (bits - low) / (high - low) * (WIDTH - _LEFT - _RIGHT)

    def y(log_kl: float) -> float:
        return HEIGHT - _BOTTOM - (log_kl - bottom) / (top - bottom) * (HEIGHT - _TOP - _BOTTOM)

    step = max(1, math.ceil((high - low) / 8))
    return Curve(
        x_ticks=tuple(Tick(x(bits), str(bits)) for bits in range(low, high + 1, step)),
        y_ticks=tuple(Tick(y(power), f"{10.0**power:g}") for power in range(bottom, top + 1)),
        marks=tuple(Mark(x(p.file_bits), y(kl), p.label) for p, kl in zip(shown, kls, strict=True)),
    )
