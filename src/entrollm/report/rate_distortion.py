"""The rate-distortion plot: KL divergence from the original over file bits, one curve per method."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from entrollm.errors import FormatError, UnsupportedError
from entrollm.system import replacing

_SUFFIXES = (".png", ".svg", ".pdf")


@dataclass(frozen=True, slots=True)
class RatePoint:
    """One model: its label, its curve, its bits per weight, and its mean KL in nats with the standard error."""

    label: str
    series: str
    file_bits: float
    kl: float
    kl_error: float | None = None


def read_points(result: object, source: str) -> list[RatePoint]:
    """Read the points of a JSON result, as `entrollm compare --json` writes it.

    Args:
        result: the parsed JSON.
        source: the name of the result, for errors; also the curve of models without a method.
    Raises:
        FormatError: the result has another form.
    """
    models = result.get("models") if isinstance(result, dict) else None
    if not isinstance(models, list):
        raise FormatError(f'{source}: expected an object with "models", a list, as `entrollm compare --json` writes it')
    return [_read_point(model, f"{source}: model {number}", source) for number, model in enumerate(models)]


def check_plotting(path: Path) -> None:
    """Check that a plot can be drawn, before anything is measured.

    Raises:
        UnsupportedError: matplotlib is not installed.
        ValueError: the file's name does not end in .png, .svg or .pdf.
    """
    if path.suffix.lower() not in _SUFFIXES:
        raise ValueError(f"{path}: name the plot {', '.join('*' + suffix for suffix in _SUFFIXES)}")
    if importlib.util.find_spec("matplotlib") is None:
        raise UnsupportedError("plots need matplotlib, which is not installed; pip install 'entrollm[plot]'")


def draw_rate_distortion(path: Path, points: Sequence[RatePoint], title: str) -> list[str]:
    """Draw points, join those of a series in the order of their bits, and write the picture in one step.

    Returns:
        The labels of points with a KL of 0, which a logarithmic axis cannot show.
    Raises:
        UnsupportedError, ValueError: as for `check_plotting`.
        OSError: the file cannot be written.
    """
    check_plotting(path)
    from matplotlib.figure import Figure

    shown = [point for point in points if point.kl > 0]
    figure = Figure(figsize=(8, 5.5), layout="constrained")
    axes = figure.add_subplot(xlabel="file bits per weight, everything included", ylabel="KL to the original (nats)")
    axes.set_title(title)
    if shown:
        axes.set_yscale("log")
    for number, series in enumerate(dict.fromkeys(point.series for point in shown)):
        members = sorted((p for p in shown if p.series == series), key=lambda point: point.file_bits)
        bits, kls = [p.file_bits for p in members], [p.kl for p in members]
        marker = "osD^vPX*"[number % 8]
        axes.errorbar(bits, kls, yerr=[p.kl_error or 0.0 for p in members], marker=marker, capsize=2, label=series)
        for member in members:
            axes.annotate(
                member.label, (member.file_bits, member.kl), xytext=(4, 4), textcoords="offset points", fontsize=7
            )
    axes.grid(which="both", alpha=0.3)
    if shown:
        axes.legend()
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=150)
    return [point.label for point in points if point.kl <= 0]


def _read_point(model: object, where: str, series: str) -> RatePoint:
    if not isinstance(model, dict):
        raise FormatError(f"{where} is no object")
    label, kl = model.get("model"), model.get("kl")
    if not isinstance(label, str) or not isinstance(kl, dict):
        raise FormatError(f'{where} needs "model", a name, and "kl", an object with its mean')
    error = kl.get("standard_error")
    method = model.get("method")
    return RatePoint(
        label=Path(label).name,
        series=method if isinstance(method, str) else series,
        file_bits=_number(model, "file_bits", where),
        kl=_number(kl, "mean", where),
        kl_error=None if error is None else _number(kl, "standard_error", where),
    )


def _number(fields: Mapping[str, Any], key: str, where: str) -> float:
    value = fields.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value < 0:
        raise FormatError(f"{where} needs {key!r}, a number of at least 0, found {value!r:.80}")
    return float(value)
