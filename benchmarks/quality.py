"""Divergence from the original over file bits: our methods, the paper's grids, group-wise grids, llama.cpp's types.

One model, one text: writes a JSON of all figures, a plot, and the tables between the marks of a page.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from common import environment
from entrollm import _core
from entrollm.calibrate import CalibrationText, StoredStatistics, calibrate
from entrollm.checkpoint.model_folder import Checkpoint
from entrollm.compress import CodingOptions, Target, compress_folder
from entrollm.compress.statistics import Statistics
from entrollm.engine.files import read_model_files
from entrollm.engine.linear import DenseLinear
from entrollm.engine.load import load
from entrollm.engine.model import Model
from entrollm.engine.weights import Embedding, Floats, Linear
from entrollm.evaluate import LanguageModel, Protocol, Windows, cut_windows, evaluate, read_text
from entrollm.models import read_config
from entrollm.models.config_fields import Fields
from entrollm.quantize.paper import Granularity
from llamacpp import TYPES
from quality_ik import TYPES as IK_TYPES
from quality_ik import ik_peers
from quality_peers import LlamaCpp, Peer, Tensors, group_peers, llamacpp_peers
from quality_torch import TorchModel, decoded, mean_squares

BITS = (2.0, 2.5, 3.0, 3.5, 4.0, 5.0, 6.0, 7.0)
GROUP_WIDTHS = (2, 3, 4)
PEERS = ("groups", "llama.cpp", "imatrix", "ik", "ik-imatrix")
PAPER: tuple[tuple[int, Granularity], ...] = ((4, "tensor"), (6, "tensor"), (8, "tensor"), (4, "row"), (5, "row"))
DATA_FREE = "data-free"
BEGIN, END = "<!-- written by benchmarks/quality.py -->\n", "<!-- end -->\n"


@dataclass(frozen=True)
class Row:
    """One model; bits per weight of its files, everything included."""

    name: str
    family: str
    file_bits: float
    kl_mean: float
    kl_p99: float
    top1: float
    perplexity: float
    note: str = ""


class ArrayWeights:
    """Weights in memory, for the engine."""

    def __init__(self, tensors: Tensors, threads: int) -> None:
        self._tensors = tensors
        self.pool = _core.ThreadPool(threads)

    def __contains__(self, name: str, /) -> bool:
        return name in self._tensors

    def linear(self, *names: str) -> Linear:
        """The matrices `names`, side by side."""
        return DenseLinear(np.concatenate([self._tensors[name] for name in names]))

    def embedding(self, name: str, /) -> Embedding:
        """The matrix `name`."""
        return DenseLinear(self._tensors[name])

    def tensor(self, name: str, /) -> Floats:
        """The tensor `name`."""
        return self._tensors[name]


class Remembered:
    """A model whose logits are kept: 4 bytes x vocabulary for each token of the windows."""

    def __init__(self, model: LanguageModel) -> None:
        self._model = model
        self._logits: dict[bytes, Floats] = {}

    def logits(self, ids: NDArray[np.int64], /) -> Floats:
        """float32 (n, vocabulary), to be read only."""
        key = ids.tobytes()
        if key not in self._logits:
            self._logits[key] = self._model.logits(ids)
        return self._logits[key]


class Measurement:
    """Measures models against one original on one text."""

    def __init__(self, model: Path, text: Path, max_windows: int, threads: int, is_in_torch: bool = False) -> None:
        self.model = model
        self.threads = threads
        self._is_in_torch = is_in_torch
        self._files = read_model_files(model)
        self.config = read_config(Fields(self._files.config, "config.json"))
        self._reference = Remembered(self._model(originals(model)))
        if self._files.tokenizer is None:
            raise ValueError(f"{model} has no tokenizer.json")
        window = min(512, self.config.context_length)
        self.windows: Windows = cut_windows(self._files.tokenizer, read_text(text), Protocol(window, max_windows))

    def folder(self, path: Path, name: str, family: str, file_bits: float) -> Row:
        """A compressed folder."""
        model = self._model(decoded(path)) if self._is_in_torch else load(path, threads=self.threads)
        return self._row(model, name, family, file_bits)

    def tensors(self, tensors: Tensors, name: str, family: str, file_bits: float, note: str) -> Row:
        """Weights in memory."""
        return self._row(self._model(tensors), name, family, file_bits, note)

    def _model(self, tensors: Tensors) -> LanguageModel:
        if self._is_in_torch:
            return TorchModel(self.model, tensors, self.threads)
        return Model(self._files, ArrayWeights(tensors, self.threads))

    def _row(self, model: LanguageModel, name: str, family: str, file_bits: float, note: str = "") -> Row:
        evaluations, _ = evaluate([model], self.windows, self._reference)
        kl = evaluations[0].divergence
        assert kl is not None
        row = Row(
            name,
            family,
            file_bits,
            kl.mean,
            kl.percentile_99,
            kl.top1_agreement,
            evaluations[0].perplexity.perplexity,
            note,
        )
        print(f"{row.name:24} {row.file_bits:.3f} bits  KL {row.kl_mean:.4f}", flush=True)
        return row


def measure_all(
    measurement: Measurement,
    known: dict[str, StoredStatistics],
    bits: Sequence[float],
    peers: Sequence[str],
    join_rows: bool,
) -> Iterator[Row]:
    """All rows; `known` has statistics by the text that they come from. llama.cpp's types are `peers` of their own."""
    model, threads = measurement.model, measurement.threads
    runs: list[tuple[str, str, CodingOptions, Statistics | None]] = []
    for asked in bits:
        options = CodingOptions(target=Target(bits_per_weight=asked), threads=threads)
        runs.append((f"data-free {asked:g}", DATA_FREE, options, None))
        runs += [(f"{text} {asked:g}", f"calibrated: {text}", options, found) for text, found in known.items()]
    for width, granularity in PAPER:
        options = CodingOptions(bits=width, granularity=granularity, threads=threads)
        runs.append((f"paper {width} bits, {granularity}", f"paper grid per {granularity}", options, None))
    with tempfile.TemporaryDirectory(prefix="quality-") as folder:
        for number, (name, family, options, statistics) in enumerate(runs):
            out = Path(folder) / str(number)
            result = compress_folder(model, out, options, statistics=statistics)
            yield measurement.folder(out, name, family, result.file_bits)
        tensors = originals(model)
        others: list[Iterable[Peer]] = []
        if "groups" in peers:
            others.append(group_peers(tensors, next(iter(known.values()), None), GROUP_WIDTHS))
        for name in PEERS[1:]:
            if name in peers:
                windows = next(iter(known.values())).windows if name.endswith("imatrix") else None
                importance = None if windows is None else mean_squares(model, tensors, windows, threads)
                make, kinds = (ik_peers, IK_TYPES) if name.startswith("ik") else (llamacpp_peers, TYPES)
                others.append(
                    make(tensors, measurement.config, Path(folder), LlamaCpp(importance, join_rows, tuple(kinds)))
                )
        for peer in itertools.chain.from_iterable(others):
            yield measurement.tensors(peer.tensors, peer.name, peer.family, peer.file_bits, peer.note)


def originals(model: Path) -> Tensors:
    """All weights of a checkpoint, in float32."""
    with Checkpoint.open(model) as checkpoint:
        return {name: checkpoint.read_float32(name) for name in checkpoint.tensors}


def _is_ours(family: str) -> bool:
    return family == DATA_FREE or family.startswith("calibrated")


def bits_at(rows: Iterable[Row], kl: float) -> float | None:
    """Bits at which a curve reaches a divergence: ln KL interpolated over bits; None outside of it."""
    points = sorted((row.file_bits, math.log(row.kl_mean)) for row in rows)
    wanted = math.log(kl)
    for (low, above), (high, below) in itertools.pairwise(points):
        if above >= wanted >= below:
            return low + (high - low) * (above - wanted) / (above - below)
    return None


def savings(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """How many fewer bits our curves take at each other model's divergence, in per cent of its bits."""
    found = []
    ours = list(dict.fromkeys(row.family for row in rows if _is_ours(row.family)))
    for peer in rows:
        if _is_ours(peer.family):
            continue
        entry: dict[str, Any] = {"name": peer.name, "file_bits": peer.file_bits, "kl_mean": peer.kl_mean}
        for family in ours:
            bits = bits_at((row for row in rows if row.family == family), peer.kl_mean)
            entry[family] = None if bits is None else 100 * (1 - bits / peer.file_bits)
        found.append(entry)
    return found


def page(results: dict[str, Any]) -> str:
    """The tables, in Markdown."""
    ours = [key for key in results["savings"][0] if _is_ours(key)] if results["savings"] else []
    lines = [
        f"{results['model']}, the first {results['windows']} windows of {results['window']} tokens of "
        f"{results['text']}; commit {results['environment']['commit']}.",
        "",
        "| model | file bits | KL mean | KL 99 % | same top token | perplexity |",
        "|---|---|---|---|---|---|",
    ]
    for row in sorted(results["models"], key=lambda row: (row["family"], row["file_bits"])):
        lines.append(
            f"| {row['name']} | {row['file_bits']:.3f} | {row['kl_mean']:.4f} | {row['kl_p99']:.3f} | "
            f"{100 * row['top1']:.1f} % | {row['perplexity']:.2f} |"
        )
    lines += ["", "How many fewer file bits we need at the same KL (negative: more; -: outside the curve):", ""]
    lines += [f"| at the KL of | its file bits | {' | '.join(ours)} |", "|---|---|" + "---|" * len(ours)]
    for entry in results["savings"]:
        shares = ("-" if entry[family] is None else f"{entry[family]:.1f} %" for family in ours)
        lines.append(f"| {entry['name']} | {entry['file_bits']:.3f} | {' | '.join(shares)} |")
    notes = [f"{row['name']}: {row['note']}" for row in results["models"] if row["note"]]
    if notes:
        lines += [
            "",
            "What llama.cpp's types consist of here (rows that are not a multiple of 256 fall back to other types): ",
        ]
        lines[-1] += "; ".join(notes) + "."
    return "\n".join(lines) + "\n"


def plot(results: dict[str, Any], path: Path) -> None:
    """KL over file bits, one curve per family."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 5))
    families: dict[str, list[dict[str, Any]]] = {}
    for row in results["models"]:
        families.setdefault(row["family"], []).append(row)
    for family, rows in families.items():
        points = sorted((row["file_bits"], row["kl_mean"]) for row in rows)
        style = "o-" if _is_ours(family) else "s" if family == "llama.cpp" else ".--"
        axes.plot(*zip(*points, strict=True), style, label=family, markersize=5, linewidth=1.2)
        for row in rows if family == "llama.cpp" else ():
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


def write_page(path: Path, text: str) -> None:
    """Replace what lies between the marks.

    Raises:
        ValueError: the page has no marks.
    """
    content = path.read_text(encoding="utf-8")
    begin, end = content.find(BEGIN), content.find(END)
    if begin < 0 or end < begin:
        raise ValueError(f"{path} has no lines {BEGIN.strip()} and {END.strip()}")
    path.write_text(content[: begin + len(BEGIN)] + "\n" + text + "\n" + content[end:], encoding="utf-8")


def main() -> None:
    """Measure, write, print the savings."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--text", type=Path, required=True, help="what divergences are measured on")
    parser.add_argument("--calibration", nargs="*", default=[], metavar="NAME=FILE|self", help="texts to calibrate on")
    parser.add_argument("--max-windows", type=int, default=12)
    parser.add_argument("--bits", type=float, nargs="*", default=list(BITS))
    parser.add_argument("--peers", nargs="*", choices=PEERS, default=PEERS[:2], help="other quantizers to compare with")
    parser.add_argument("--torch", action="store_true", help="measure with PyTorch, as quality_torch.py says")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", "-o", type=Path, required=True, help="JSON")
    parser.add_argument("--page", type=Path, help="a page with marks for the tables")
    parser.add_argument("--plot", type=Path, help="PNG")
    parser.add_argument(
        "--join-rows", action="store_true", help="give llama.cpp as many rows as fill 256 weights as one"
    )
    arguments = parser.parse_args()
    if any(name.endswith("imatrix") for name in arguments.peers) and not arguments.calibration:
        parser.error("--peers imatrix and ik-imatrix need a --calibration, whose windows they read")
    model, text = arguments.model, arguments.text
    measurement = Measurement(model, text, arguments.max_windows, arguments.threads, arguments.torch)
    with tempfile.TemporaryDirectory(prefix="calibration-") as folder:
        known: dict[str, StoredStatistics] = {}
        for item in arguments.calibration:
            name, _, file = item.rpartition("=")
            place = Path(folder) / str(len(known))
            place.mkdir()
            known[name or file] = calibrate(arguments.model, CalibrationText(None if file == "self" else file), place)
        rows = list(measure_all(measurement, known, arguments.bits, arguments.peers, arguments.join_rows))
    count, window = measurement.windows.ids.shape
    results = {
        "model": arguments.model.resolve().name,
        "text": arguments.text.name,
        "windows": count,
        "window": window,
        "models": [asdict(row) for row in rows],
        "savings": savings(rows),
        "environment": environment(),
    }
    arguments.output.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    if arguments.page is not None:
        write_page(arguments.page, page(results))
    if arguments.plot is not None:
        plot(results, arguments.plot)


if __name__ == "__main__":
    main()
