"""Divergence from the original over file bits: our methods, the paper's grids, group-wise grids, llama.cpp's types.

One model on one or more texts: writes a JSON of all figures, a plot, and the tables between the marks of a page. What
the JSON already has is not measured again, so that a run can be continued and extended.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from common import environment
from entrollm.calibrate import CalibrationText, StoredStatistics, calibrate, calibration_windows
from entrollm.compress import CodingOptions, Target, compress_folder
from entrollm.engine.files import read_model_files
from entrollm.evaluate import model_size
from entrollm.quantize.paper import Granularity
from llamacpp import TYPES
from quality_ik import TYPES as IK_TYPES
from quality_ik import ik_peers
from quality_measure import WINDOW, Identity, Measurement, Row, originals
from quality_page import plot, write_page
from quality_peers import LlamaCpp, Peer, Tensors, given_title, group_peers, llamacpp_peers
from quality_text import open_text
from quality_torch import second_moments

BITS = (2.0, 2.5, 3.0, 3.5, 4.0, 5.0, 6.0, 7.0)
PEERS = ("paper", "groups", "llama.cpp", "imatrix", "ik", "ik-imatrix")
PAPER: tuple[tuple[int, Granularity], ...] = ((4, "tensor"), (6, "tensor"), (8, "tensor"), (4, "row"), (5, "row"))
DATA_FREE = "data-free"


@dataclass(frozen=True)
class Asked:
    """What to measure.

    Attributes:
        bits: sizes of our files, for each way to make them.
        calibrations: texts to calibrate on, by their names; `None` for what the model writes.
        folders: compressed folders, each with the name of its curve.
        peers: some of `PEERS`.
        widths: bits of the group-wise grids.
        types: those of llama.cpp and ik_llama.cpp to measure.
        peer_text: the text that importance matrices and GPTQ read; `None` if absent.
        peer_windows: how many windows of it.
        joins_rows: whether llama.cpp gets as many rows as fill 256 weights as one.
    """

    bits: Sequence[float]
    calibrations: dict[str, Path | None]
    folders: Sequence[tuple[str, Path]]
    peers: Sequence[str]
    widths: tuple[int, ...]
    types: Sequence[str]
    peer_text: Path | None
    peer_windows: int
    joins_rows: bool


def measure_all(measurement: Measurement, asked: Asked, measured: set[str]) -> Iterator[Row]:
    """The rows of all that is asked for, but for those whose names are in `measured`."""
    for curve, path in asked.folders:
        file_bits = model_size(path).file_bits
        if (name := f"{curve} {file_bits:.1f}") not in measured:
            yield from measurement.folder(path, Identity(name, curve, True, file_bits))
    yield from _compressed(measurement, asked, measured)
    tensors = originals(measurement.model)
    for peer in _peers(measurement, asked, tensors, measured):
        yield from measurement.tensors(peer.tensors, Identity(peer.name, peer.family, False, peer.file_bits, peer.note))


def _compressed(measurement: Measurement, asked: Asked, measured: set[str]) -> Iterator[Row]:
    """Our curves and the paper's grids."""
    with tempfile.TemporaryDirectory(prefix="quality-") as temporary:
        folder = Path(temporary)

        @functools.cache
        def statistics(text: str) -> StoredStatistics:
            place = folder / f"calibration-{text}"
            place.mkdir()
            return calibrate(measurement.model, CalibrationText(asked.calibrations[text]), place)

        runs: list[tuple[Identity, CodingOptions, str | None]] = []
        for text, bits in itertools.product((None, *asked.calibrations), asked.bits):
            curve = DATA_FREE if text is None else f"calibrated: {text}"
            options = CodingOptions(target=Target(bits_per_weight=bits), threads=measurement.threads)
            runs.append((Identity(f"{text or DATA_FREE} {bits:g}", curve, True, bits), options, text))
        for width, granularity in PAPER if "paper" in asked.peers else ():
            grid = Identity(f"paper {width} bits, {granularity}", f"paper grid per {granularity}", False, width)
            options = CodingOptions(bits=width, granularity=granularity, threads=measurement.threads)
            runs.append((grid, options, None))
        for number, (identity, options, text) in enumerate(runs):
            if identity.name in measured:
                continue
            out = folder / str(number)
            found = compress_folder(
                measurement.model, out, options, statistics=None if text is None else statistics(text)
            )
            made = Identity(identity.name, identity.family, identity.is_ours, found.file_bits)
            yield from measurement.folder(out, made)


def _peers(measurement: Measurement, asked: Asked, tensors: Tensors, measured: set[str]) -> Iterator[Peer]:
    """Group-wise grids and llama.cpp's types."""

    @functools.cache
    def moments() -> Tensors:
        tokenizer = read_model_files(measurement.model).tokenizer
        assert tokenizer is not None  # `Measurement` has one
        assert asked.peer_text is not None  # `main` asks for one
        windows = calibration_windows(tokenizer, asked.peer_text, WINDOW, asked.peer_windows)
        return second_moments(measurement.model, tensors, windows, measurement.threads)

    if "groups" in asked.peers:
        yield from group_peers(tensors, moments if asked.peer_text else None, asked.widths, measured)
    for name in PEERS[2:]:
        has_matrix, is_ik = name.endswith("imatrix"), name.startswith("ik")
        title = given_title(has_matrix, asked.joins_rows)
        kinds = [
            kind for kind in (IK_TYPES if is_ik else TYPES) if kind in asked.types and kind + title not in measured
        ]
        if name not in asked.peers or not kinds:
            continue
        importance = {name: np.diag(found).copy() for name, found in moments().items()} if has_matrix else None
        with tempfile.TemporaryDirectory(prefix="quality-") as folder:
            make = ik_peers if is_ik else llamacpp_peers
            given = LlamaCpp(importance, asked.joins_rows, tuple(kinds))
            yield from make(tensors, measurement.config, Path(folder), given)


def _known_rows(path: Path, expected: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows of earlier results.

    Raises:
        ValueError: they are of another model, or of other texts.
    """
    if not path.exists():
        return []
    results = json.loads(path.read_text(encoding="utf-8"))
    for key, value in expected.items():
        if results.get(key) != value:
            raise ValueError(f"{path} has results of {key} {results.get(key)}, not of {value}; choose another --output")
    rows: list[dict[str, Any]] = results["models"]
    return rows


def _named(argument: str) -> tuple[str, str]:
    """The parts of NAME=VALUE; without a name, the value is the name too."""
    name, _, value = argument.rpartition("=")
    return name or value, value


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--title", help="the model's name in the results; the folder's name by default")
    parser.add_argument(
        "--text",
        nargs="+",
        required=True,
        metavar="[NAME=]FILE|NAME=stdlib",
        help="what divergences are measured on; stdlib stands for excerpts of Python's standard library",
    )
    parser.add_argument("--calibration", nargs="*", default=[], metavar="NAME=FILE|self", help="texts to calibrate on")
    parser.add_argument(
        "--folder", nargs="*", default=[], metavar="CURVE=FOLDER", help="compressed folders to measure as well"
    )
    parser.add_argument("--max-windows", type=int, default=12, help="windows of each text")
    parser.add_argument("--bits", type=float, nargs="*", default=list(BITS))
    parser.add_argument("--peers", nargs="*", choices=PEERS, default=PEERS[:3], help="other quantizers to compare with")
    parser.add_argument("--peer-text", type=Path, help="the text that GPTQ and importance matrices read")
    parser.add_argument("--peer-windows", type=int, default=64, help="how many windows of it")
    parser.add_argument("--widths", type=int, nargs="*", default=[2, 3, 4], help="of group-wise grids")
    parser.add_argument("--types", nargs="*", default=[*TYPES, *IK_TYPES], help="of llama.cpp and ik_llama.cpp")
    parser.add_argument("--torch", action="store_true", help="measure with PyTorch, as quality_torch.py says")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", "-o", type=Path, required=True, help="JSON")
    parser.add_argument("--page", type=Path, help="a page with marks for the tables")
    parser.add_argument("--plot", type=Path, help="PNG")
    parser.add_argument(
        "--join-rows", action="store_true", help="give llama.cpp as many rows as fill 256 weights as one"
    )
    return parser


def main() -> None:
    """Measure, write after each model."""
    parser = _parser()
    arguments = parser.parse_args()
    if any(name.endswith("imatrix") for name in arguments.peers) and arguments.peer_text is None:
        parser.error("--peers imatrix and ik-imatrix need a --peer-text")
    calibrations = {name: None if file == "self" else Path(file) for name, file in map(_named, arguments.calibration)}
    asked = Asked(
        arguments.bits,
        calibrations,
        [(curve, Path(folder)) for curve, folder in map(_named, arguments.folder)],
        arguments.peers,
        tuple(arguments.widths),
        arguments.types,
        arguments.peer_text,
        arguments.peer_windows,
        arguments.join_rows,
    )
    texts = [open_text(text) for text in arguments.text]
    measurement = Measurement(arguments.model, texts, arguments.max_windows, arguments.threads, arguments.torch)
    identity = {
        "model": arguments.title or arguments.model.resolve().name,
        "texts": {
            text.name: dict(zip(("windows", "window"), measurement.windows[text.name].ids.shape, strict=True))
            | {"source": text.source}
            for text in texts
        },
    }
    rows = _known_rows(arguments.output, identity)
    results = {**identity, "models": rows, "environment": environment()}
    # Rows of a model whose measurement was interrupted between two texts are dropped.
    complete = {row["name"] for row in rows if row["text"] == texts[-1].name}
    rows[:] = [row for row in rows if row["name"] in complete]
    for row in measure_all(measurement, asked, complete):
        rows.append(asdict(row))
        if row.text == texts[-1].name:
            arguments.output.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    if arguments.page is not None:
        write_page(arguments.page, results)
    if arguments.plot is not None:
        plot(results, arguments.plot)


if __name__ == "__main__":
    main()
