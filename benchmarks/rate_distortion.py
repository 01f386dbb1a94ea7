"""Draw the README's picture, KL over file bits beside GGUF types, from recorded results of quality.py.

usage: python benchmarks/rate_distortion.py [--out FOLDER]

Writes rate-distortion-light.png and rate-distortion-dark.png, whose backgrounds are transparent.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
# Our curves: their family in the results, and their label.
CURVES = (("calibrated: wiki", "EntroLLM, calibrated"), ("data-free", "EntroLLM, without data"))
PEERS = "llama.cpp"
# Where the label of a point goes that others crowd: shift in points, and alignment.
PLACES = {
    "quality": {"IQ3_S": (-7, 0, "right"), "IQ4_XS": (-7, 0, "right")},
    "quality-student": {"Q4_0": (5, 8, "left"), "IQ4_XS": (7, 1, "left"), "Q4_K_M": (7, -3, "left")},
}
TITLES = {
    "quality": "15.7 M weights, rows of 384\n(GGUF falls back to larger types)",
    "quality-student": "21 M weights, rows of 512 and 1536\n(GGUF types as named)",
}


@dataclass(frozen=True)
class Theme:
    """Colours of one picture: of text, of grid lines, of our two curves and of GGUF types."""

    name: str
    text: str
    grid: str
    ours: tuple[str, str]
    peers: str


THEMES = (
    Theme("light", "#1f2328", "#d1d9e0", ("#0a58ca", "#5aa7e8"), "#c2410c"),
    Theme("dark", "#e6edf3", "#3d444d", ("#4493f8", "#9ecbff"), "#f0883e"),
)


def main() -> None:
    """Write both pictures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "_static")
    arguments = parser.parse_args()
    results = {name: json.loads((RESULTS / f"{name}.json").read_text()) for name in TITLES}
    for theme in THEMES:
        path = arguments.out / f"rate-distortion-{theme.name}.png"
        draw(results, theme, path)
        print(f"wrote {path}")


def draw(results: dict[str, Any], theme: Theme, path: Path) -> None:
    """Draw one panel for each model."""
    colours = {f"{kind}.color": theme.text for kind in ("xtick", "ytick")}
    colours |= {"text.color": theme.text, "axes.labelcolor": theme.text, "axes.edgecolor": theme.grid}
    with plt.rc_context(colours | {"font.size": 11}):
        figure, panels = plt.subplots(1, len(results), figsize=(10.4, 5.4), sharex=True, layout="constrained")
        for axes, (name, result) in zip(panels, results.items(), strict=True):
            text = next(iter(result["texts"]))
            _panel(axes, [row for row in result["models"] if row["text"] == text], PLACES[name], theme)
            axes.set_title(TITLES[name], fontsize=11)
        panels[0].set_ylabel("KL divergence from the original, nats")
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
        figure.savefig(path, dpi=160, transparent=True, metadata={"Software": None})
        plt.close(figure)


def _panel(axes: Axes, models: list[dict[str, Any]], labels: dict[str, tuple[int, int, str]], theme: Theme) -> None:
    for (family, label), colour in zip(CURVES, theme.ours, strict=True):
        points = sorted((row["file_bits"], row["kl_mean"]) for row in models if row["family"] == family)
        axes.plot(*zip(*points, strict=True), "o-", color=colour, label=label, markersize=5, linewidth=2)
    peers = [row for row in models if row["family"] == PEERS]
    places = [(row["file_bits"], row["kl_mean"]) for row in peers]
    axes.plot(*zip(*places, strict=True), "s", color=theme.peers, label="GGUF types of llama.cpp", markersize=6)
    for row, place in zip(peers, places, strict=True):
        right, up, alignment = labels.get(row["name"], (7, 0, "left"))
        axes.annotate(
            row["name"], place, (right, up), textcoords="offset points", ha=alignment, va="center", fontsize=9.5
        )
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.set_xlim(1.8, 9.4)
    axes.set_xlabel("file bits per weight, everything included")
    axes.grid(color=theme.grid, linewidth=0.7)
    axes.spines[["top", "right"]].set_visible(False)


if __name__ == "__main__":
    main()
