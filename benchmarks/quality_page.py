"""The tables and the plot of quality.py's results."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

END = "<!-- end -->\n"

Row = dict[str, Any]
_Floats = NDArray[np.float64]


def bits_at(points: Sequence[tuple[float, float]], kl: float) -> float | None:
    """Bits at which a curve of (bits, KL) reaches a divergence: ln KL interpolated over bits; None outside of it."""
    ordered = sorted((bits, math.log(value)) for bits, value in points)
    wanted = math.log(kl)
    for (low, above), (high, below) in itertools.pairwise(ordered):
        if above >= wanted >= below:
            return low + (high - low) * (above - wanted) / (above - below)
    return None


def savings(rows: Sequence[Row], text: str) -> list[dict[str, Any]]:
    """How many fewer bits our curves take at each other model's divergence on a text, in per cent of its bits.

    Returns:
        an entry for each other model, with the saving and its standard error under the name of each curve; `None`
        outside the curve.
    """
    here = [row for row in rows if row["text"] == text]
    ours: dict[str, list[Row]] = {}
    for row in here:
        if row["is_ours"]:
            ours.setdefault(row["family"], []).append(row)
    found = []
    for peer in here:
        if not peer["is_ours"]:
            entry = {key: peer[key] for key in ("name", "file_bits", "kl_mean")}
            found.append(entry | {family: _saving(peer, points) for family, points in ours.items()})
    return found


def _saving(peer: Row, curve: Sequence[Row]) -> tuple[float, float | None] | None:
    """A saving and its standard error, by the jackknife over windows: each is left out in turn, of all models."""
    windows = len(peer["window_kl"])
    kept = [np.arange(windows) != left_out for left_out in range(windows)]
    without = [_saving_on(peer, curve, mask) for mask in kept]
    whole = _saving_on(peer, curve, np.ones(windows, bool))
    if whole is None:
        return None
    values = [value for value in without if value is not None]
    if len(values) < windows or windows < 2:
        return whole, None
    return whole, math.sqrt((windows - 1) * float(np.var(values)))


def _saving_on(peer: Row, curve: Sequence[Row], kept: NDArray[np.bool_]) -> float | None:
    points = [(row["file_bits"], _mean(row, kept)) for row in curve]
    bits = bits_at(points, _mean(peer, kept))
    return None if bits is None else 100 * (1 - bits / peer["file_bits"])


def _mean(row: Row, kept: NDArray[np.bool_]) -> float:
    return float(np.asarray(row["window_kl"])[kept].mean())


def _error(row: Row) -> str:
    """The standard error of the mean, from the spread between windows."""
    values: _Floats = np.asarray(row["window_kl"])
    return f" +- {values.std(ddof=1) / math.sqrt(len(values)):.4f}" if len(values) > 1 else ""


def page(results: dict[str, Any]) -> str:
    """The tables, in Markdown: figures on all texts, what ours save on each, and what llama.cpp's types consist of."""
    rows = results["models"]
    texts = [
        f"{name} (the first {text['windows']} windows of {text['window']} tokens of {text['source']})"
        for name, text in results["texts"].items()
    ]
    commit = results["environment"]["commit"]
    lines = [
        f"{results['model']} on {' and '.join(texts)}; commit {commit}:",
        "",
        *_figures(rows, results["texts"]),
        "",
    ]
    for name in results["texts"]:
        lines += [
            f"File bits that ours save at the same KL on {name}, in per cent (negative: more; -: outside the curve):",
            "",
            *_savings(savings(rows, name)),
            "",
        ]
    notes = {row["name"]: row["note"] for row in rows if row["note"]}
    if notes:
        listed = "; ".join(f"{name}: {note}" for name, note in notes.items())
        lines += [f"What llama.cpp's types consist of here: {listed}.", ""]
    return "\n".join(lines)


def _figures(rows: Sequence[Row], texts: Iterable[str]) -> list[str]:
    found = {(row["name"], row["text"]): row for row in rows}
    models = {row["name"]: (not row["is_ours"], row["family"], row["file_bits"]) for row in rows}
    columns = [f"{figure}: {text}" for figure in ("KL", "KL 99 %", "same top token") for text in texts]
    lines = [f"| model | file bits | {' | '.join(columns)} |", "|---|---|" + "---|" * len(columns)]
    for name in sorted(models, key=lambda name: models[name]):
        here = [found[name, text] for text in texts]
        cells = [f"{row['kl_mean']:.4f}{_error(row)}" for row in here]
        cells += [f"{row['kl_p99']:.3f}" for row in here]
        cells += [f"{100 * row['top1']:.1f} %" for row in here]
        lines.append(f"| {name} | {here[0]['file_bits']:.3f} | {' | '.join(cells)} |")
    return lines


def _savings(entries: Sequence[dict[str, Any]]) -> list[str]:
    ours = [key for key in entries[0] if key not in ("name", "file_bits", "kl_mean")] if entries else []
    lines = [f"| at the KL of | its file bits | {' | '.join(ours)} |", "|---|---|" + "---|" * len(ours)]
    for entry in entries:
        shares = (_share(entry[family]) for family in ours)
        lines.append(f"| {entry['name']} | {entry['file_bits']:.3f} | {' | '.join(shares)} |")
    return lines


def _share(saving: tuple[float, float | None] | None) -> str:
    if saving is None:
        return "-"
    share, error = saving
    return f"{share:.1f}" if error is None else f"{share:.1f} +- {error:.1f}"


def plot(results: dict[str, Any], path: Path) -> None:
    """KL over file bits on the first text, one curve per family."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 5))
    families: dict[str, list[Row]] = {}
    text = next(iter(results["texts"]))
    for row in results["models"]:
        if row["text"] == text:
            families.setdefault(row["family"], []).append(row)
    for family, rows in families.items():
        points = sorted((row["file_bits"], row["kl_mean"]) for row in rows)
        is_type = family.startswith("llama.cpp")
        style = "o-" if rows[0]["is_ours"] else "s" if is_type else ".--"
        axes.plot(*zip(*points, strict=True), style, label=family, markersize=5, linewidth=1.2)
        for row in rows if is_type else ():
            place = (row["file_bits"], row["kl_mean"])
            axes.annotate(row["name"], place, textcoords="offset points", xytext=(4, 4), fontsize=7)
    axes.set_yscale("log")
    axes.set_xlim(1.8, 8.8)
    axes.set_xlabel("file bits per weight, everything included")
    axes.set_ylabel("KL divergence from the original, nats")
    axes.grid(alpha=0.3, which="both")
    axes.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=120, metadata={"Software": None})


def write_page(path: Path, results: dict[str, Any]) -> None:
    """Replace what lies between the marks of a model: a line with its name and the next mark of an end.

    Raises:
        ValueError: the page has no marks.
    """
    content = path.read_text(encoding="utf-8")
    mark = f"<!-- {results['model']}: written by benchmarks/quality.py -->\n"
    begin = content.find(mark)
    end = content.find(END, begin)
    if begin < 0 or end < 0:
        raise ValueError(f"{path} has no line {mark.strip()} with a line {END.strip()} after it")
    path.write_text(content[: begin + len(mark)] + "\n" + page(results) + content[end:], encoding="utf-8")
