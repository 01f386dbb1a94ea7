"""Tokens per second of the paper's codes and ours: measured here, and projected for other machines.

usage: python benchmarks/edge.py [COUNTS.json] [--measure] [--gib N] [--weights N] [--json FILE]

COUNTS.json is what `benchmarks/arm/count.py --json` writes; boards are projected from it. With --measure, products are
timed here with one and two threads, and PCs are projected from the rate of one core. A projected rate is the lower one
of what all cores can issue at best and what the memory delivers; nothing is measured on those machines. Tables are
Markdown, with ratios over plain bytes.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from common import SEED, Coded, finish, source, timed
from entrollm import _core
from entrollm.codec.choose import Prefer
from entrollm.engine.code_speeds import flat_nibbles
from entrollm.format.code import Code, Field


@dataclass(frozen=True)
class Machine:
    """Published figures: cores, their clock over that of the core whose rate is known, and peak bandwidth."""

    name: str
    cores: int
    core: str
    clock_ratio: float
    gigabytes_per_s: float


BOARDS = (
    Machine("Jetson Nano", 4, "Cortex-A57", 1.0, 25.6),
    Machine("Raspberry Pi 4", 4, "Cortex-A72", 1.0, 12.8),
    Machine("Raspberry Pi 5", 4, "Cortex-A76", 1.0, 17.1),
    Machine("Jetson Orin Nano", 6, "Cortex-A76", 1.5 / 2.4, 68.0),  # its A78AE are A76 here
    Machine("Apple M1", 4, "Apple Firestorm", 1.0, 68.3),
)
# By instruction set, with the cores of the machine that measures.
PCS = {
    "avx2": Machine("8-core laptop, DDR5-5600", 8, "here", 1.0, 89.6),
    "avx512": Machine("8-core Zen 5, DDR5-6000", 8, "here", 1.0, 96.0),
}
# Of the peak, what a product that streams weights can use; such boards' copies reach a third to two thirds.
SUSTAINED = 0.5


@dataclass(frozen=True)
class Form:
    """How weights are held.

    Attributes:
        name: for the table.
        counted: the row of COUNTS.json.
        bits: per weight, in the memory that products read, with patches.
        entropy: of the Gaussian source that it is measured on.
        code: how its code is chosen, or the code; or plain fields of 4 bits, which are fastest in the flat layout.
        is_flat: whether it is transcoded to memory.
    """

    name: str
    counted: str
    bits: float
    entropy: float
    code: Prefer | Code | Literal["nibbles"]
    is_flat: bool = False


# The paper's grid of 8 bits takes 5.4 to 6.4 bits of entropy on real models, and that of 4 bits 1.5 to 2.4. At the KL
# of the first, ours have 0.4 bits less, and at that of the second about as many.
FORMS = (
    Form("uint8", "plain uint8", 8.0, 5.6, Code(Field(8, ()))),
    Form("uint8, Huffman (the paper's)", "Huffman tree at 5.6", 5.7, 5.6, "size"),
    Form("uint4", "plain uint4", 4.0, 1.47, "nibbles"),
    Form("uint4, Huffman (the paper's)", "1-1-1-2", 1.5, 1.47, "size"),
    Form("at the KL of uint8, from the file", "Huffman tree at 5.6", 5.3, 5.2, "size"),
    Form("at the KL of uint8, flat in memory", "in memory: flat 6, 0.7 % patches", 6.1, 5.2, "size", is_flat=True),
    Form("at the KL of uint4, from the file", "1-1-1-2", 1.5, 1.47, "speed"),
    Form("at the KL of uint4, flat in memory", "in memory: flat 2, 0.7 % patches", 2.1, 1.47, "speed", is_flat=True),
    Form("3.0 bits, from the file", "3-2-3", 3.1, 3.0, "speed"),
    Form("3.0 bits, flat in memory", "in memory: flat 4, 0.7 % patches", 4.0, 3.0, "speed", is_flat=True),
)
ROWS, COLUMNS = 2048, 4096
_CACHED_ROWS = 64
_LEVELS = 16


@dataclass(frozen=True)
class Measured:
    """One form here: stored bits, and Gweights/s by number of threads and of one core from its caches."""

    name: str
    bits: float
    one_thread: float
    two_threads: float
    cached: float


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("counts", type=Path, nargs="?")
    parser.add_argument("--measure", action="store_true")
    parser.add_argument("--gib", type=float, default=0.5, help="GiB of int8 weights that every product reads")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--weights", type=float, default=1.1, help="billions of weights of the model")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    if arguments.counts is not None:
        rates = rates_by_form(json.loads(arguments.counts.read_text())["rows"])
        known = [(form.name, form.bits, rates[form.counted]) for form in FORMS if form.counted in rates]
        print_projected(known, BOARDS, arguments.weights)
    if arguments.measure:
        found = measure(arguments.gib, arguments.repeats)
        print_measured(found, arguments.weights)
        pc = next((pc for isa, pc in PCS.items() if _core.isa().startswith(isa)), None)
        if pc is not None:
            print()
            print_projected([(m.name, m.bits, {"here": m.cached}) for m in found], (pc,), arguments.weights)
        finish({"rows": [asdict(m) for m in found]}, arguments.json)


def measure(gib: float, repeats: int) -> list[Measured]:
    """Time all forms in turns."""
    x = np.random.default_rng(SEED).standard_normal((1, COLUMNS)).astype(np.float32)
    repeat = max(1, round(gib * 2**30 / (ROWS * COLUMNS)))
    pools = [_core.ThreadPool(1), _core.ThreadPool(2)]
    matrices = [_make(form, ROWS, repeat, pools[1]) for form in FORMS]
    small = [_make(form, _CACHED_ROWS, 1, pools[1])[0] for form in FORMS]
    calls = [[timed(lambda m=matrix, p=pool: m.multiply(x, p)) for matrix, _ in matrices] for pool in pools]
    calls.append([timed(lambda m=matrix: m.multiply(x, pools[0])) for matrix in small])
    weights = [ROWS * COLUMNS * repeat, ROWS * COLUMNS * repeat, _CACHED_ROWS * COLUMNS]
    rates = []
    for some, count in zip(calls, weights, strict=True):
        seconds: list[list[float]] = [[] for _ in some]
        for _ in range(repeats + 1):
            for call, times in zip(some, seconds, strict=True):
                times.append(call())
        rates.append([count / statistics.median(times[1:]) / 1e9 for times in seconds])
    return [
        Measured(form.name, bits, *(rate[i] for rate in rates))
        for i, (form, (_, bits)) in enumerate(zip(FORMS, matrices, strict=True))
    ]


def _make(
    form: Form, rows: int, repeat: int, pool: _core.ThreadPool
) -> tuple[_core.CodedMatrix | _core.FlatMatrix, float]:
    """A matrix in a form, and its bits per weight."""
    symbols = _symbols(form, rows)
    if form.code == "nibbles":
        return flat_nibbles(np.tile(symbols, (repeat, 1)), np.ones(1, np.float32), None, pool), form.bits
    prefer, code = ("speed", form.code) if isinstance(form.code, Code) else (form.code, None)
    coded = Coded(symbols, repeat, prefer, code)
    if not form.is_flat:
        return coded.matrix, coded.bits
    flat = _core.FlatMatrix(coded.matrix, pool)
    return flat, flat.size_bytes * 8 / coded.weights


def _symbols(form: Form, rows: int) -> NDArray[np.uint8]:
    symbols = source(form.entropy, (rows, COLUMNS))
    return np.clip(symbols, 120, 119 + _LEVELS) - np.uint8(120) if form.code == "nibbles" else symbols


def print_measured(found: Sequence[Measured], weights: float) -> None:
    """Tokens per second of products alone, and ratios over plain bytes."""
    print(f"| measured, {_core.isa()} | bits | 1 thread | 2 threads |\n|---|---|---|---|")
    plain = found[0]
    for each in found:
        one = f"{each.one_thread / weights:.1f} ({each.one_thread / plain.one_thread:.2f})"
        two = f"{each.two_threads / weights:.1f} ({each.two_threads / plain.two_threads:.2f})"
        print(f"| {each.name} | {each.bits:.2f} | {one} | {two} |")


def print_projected(
    forms: Sequence[tuple[str, float, Mapping[str, float]]], machines: Sequence[Machine], weights: float
) -> None:
    """Tokens per second, ratios over the first form, and limits, by what one core of each kind can do."""
    print("| projected tokens/s | bits | " + " | ".join(machine.name for machine in machines) + " |")
    print("|---|---|" + "---|" * len(machines))
    plain = [project(machine, forms[0][2], forms[0][1]) for machine in machines]
    for name, bits, rates in forms:
        cells = []
        for machine, base in zip(machines, plain, strict=True):
            rate = project(machine, rates, bits)
            bound = "memory" if rate < instruction_rate(machine, rates) else "cores"
            cells.append(f"{rate / weights:.1f} ({rate / base:.2f}, {bound})")
        print(f"| {name} | {bits:.2f} | " + " | ".join(cells) + " |")


def rates_by_form(rows: list[Mapping[str, object]]) -> dict[str, Mapping[str, float]]:
    """Gweights/s of one core of each kind, by form; trees are named by their entropy."""
    found = {}
    for row in rows:
        name, rates = str(row["code"]), row["gweights_per_s"]
        assert isinstance(rates, dict)
        found[f"Huffman tree at {row['entropy_bits']}" if "tree" in name.lower() else name.removeprefix("cascade ")] = (
            rates
        )
    return found


def instruction_rate(machine: Machine, rates: Mapping[str, float]) -> float:
    """Gweights/s that all cores can issue at best."""
    return machine.cores * machine.clock_ratio * rates[machine.core]


def project(machine: Machine, rates: Mapping[str, float], bits: float) -> float:
    """Gweights/s of a product."""
    return min(instruction_rate(machine, rates), SUSTAINED * machine.gigabytes_per_s * 8 / bits)


if __name__ == "__main__":
    main()
