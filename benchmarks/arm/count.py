"""AArch64 instructions per weight by code, counted under qemu-user, and the rates that they allow.

usage: python benchmarks/arm/count.py --build build/aarch64 [--json FILE]

Needs the cross-built native library (see .ci/arm), aarch64-linux-gnu-g++ and qemu-aarch64-static. One block of 8192
weights (2 rows of 4096) is decoded and multiplied with single-stepped translation, which logs every instruction; or 8
flat rows of 4096 weights are multiplied, with as many patches as a Gaussian source of that width needs.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

sys.path.insert(0, str(Path(__file__).parents[1]))

from common import finish, source
from entrollm import _core
from entrollm.codec.choose import choose_code
from entrollm.codec.shapes import rank
from entrollm.compress.describe import describe_code
from entrollm.format.code import Code, Field, Node

ROOT = Path(__file__).parents[2]
ROWS, COLUMNS = 2, 4096
FLAT_ROWS = 8
# Bits of the flat form, 8 for plain bytes, and patches of a thousand weights.
FLAT = ((2, 7), (3, 8), (4, 7), (5, 2), (6, 7), (4, 0), (8, 0))
CASCADES = (((1, 1, 1, 2), 1.47), ((2, 1, 1, 2, 2), 2.2), ((3, 2, 3), 3.0), ((4, 3, 3, 5), 4.4))
TREES = (3.0, 4.4, 5.6)
ISAS = ("neon", "neon-dot")
# The kernels and decode_block are counted; code that runs once for a whole product is not.
_ONCE = (
    "Activations|largest_bits|split_digits|ThreadPool|4CodeC|4Code5parse|DecodeScratch|select_|built_|thread_scratch"
)
_OURS = re.compile(rf"_ZN8entrollm(?!.*(?:{_ONCE}))")
_MULTIPLY = re.compile(r"mul|mla|smull|umull|smlal|umlal")
_SHIFT = re.compile(r"ushr|sshr|shl|sli|sri|usra|ssra|ushl")


@dataclass(frozen=True)
class Core:
    """Published widths of a core: instructions, loads and vector operations a cycle."""

    name: str
    gigahertz: float
    width: int
    loads: int
    isa: str
    vectors: int = 2


# Half of the vector pipes are taken to shift, and half to multiply; one store a cycle.
CORES = (
    Core("Cortex-A57", 1.43, 3, 1, "neon"),
    Core("Cortex-A72", 1.5, 3, 1, "neon"),
    Core("Cortex-A76", 2.4, 4, 2, "neon-dot"),
    Core("Apple Firestorm", 3.2, 8, 3, "neon-dot", 4),
)


class InstructionCounter:
    """Counts the instructions of one block of a code by class."""

    def __init__(self, build: Path, folder: Path) -> None:
        self._folder = folder
        self._programs = {name: self._compile(build, name) for name in ("count_block", "count_flat")}
        self._kinds = {name: self._disassemble(program) for name, program in self._programs.items()}

    def _compile(self, build: Path, name: str) -> Path:
        program = self._folder / name
        subprocess.run(
            [
                "aarch64-linux-gnu-g++", "-O2", "-std=c++20", "-static", f"-I{ROOT / 'native'}",
                str(ROOT / f"benchmarks/arm/{name}.cpp"), str(build / "libentrollm_native.a"), "-o", str(program),
            ],
            check=True,
        )  # fmt: skip
        return program

    def _disassemble(self, program: Path) -> dict[int, tuple[str, ...]]:
        listing = subprocess.run(
            ["aarch64-linux-gnu-objdump", "-d", "--no-show-raw-insn", str(program)],
            check=True,
            capture_output=True,
            text=True,
        ).stdout
        found = re.findall(r"^\s+([0-9a-f]+):\s+(\S+)[ \t]*([^\n]*)$", listing, re.M)
        return {int(address, 16): _kind(name, operands) for address, name, operands in found}

    def count(self, code: Code, symbols: NDArray[np.uint8], isa: str) -> Counter[str]:
        """Instructions of one block; "all" has their sum, loads and stores of pairs count as two in their class."""
        dense, sparse, _ = _core.encode(code.program(), code.low_bits, symbols, ROWS, COLUMNS)
        (self._folder / "program").write_bytes(code.program())
        for name, stream in (("dense", dense), ("sparse", sparse)):
            (self._folder / name).write_bytes(stream.tobytes() + bytes(2 * _core.SLACK_BYTES))
        arguments = [str(self._folder), str(code.low_bits), str(ROWS), str(COLUMNS), str(sparse.size)]
        return self._trace("count_block", arguments, isa)

    def count_flat(self, bits: int, patches_per_thousand: int, isa: str) -> Counter[str]:
        """The same of the product of some flat rows."""
        arguments = [str(bits), str(FLAT_ROWS), str(COLUMNS), str(patches_per_thousand)]
        return self._trace("count_flat", arguments, isa)

    def _trace(self, name: str, arguments: list[str], isa: str) -> Counter[str]:
        log = self._folder / "log"
        trace = ["qemu-aarch64-static", "-cpu", "max", "-singlestep", "-d", "exec,nochain", "-D", str(log)]
        subprocess.run(
            [*trace, str(self._programs[name]), *arguments],
            check=True,
            capture_output=True,
            env={**os.environ, "ENTROLLM_ISA": isa},
        )
        counts: Counter[str] = Counter()
        for line in log.read_text().splitlines():
            if _OURS.search(line):
                counts["all"] += 1
                for kind in self._kinds[name][int(line.split("[")[1].split("/")[1], 16)]:
                    counts[kind] += 1
        return counts


def _kind(name: str, operands: str) -> tuple[str, ...]:
    if name.startswith(("ld", "st")):
        kind = "load" if name.startswith("ld") else "store"
        return (kind, kind) if name in ("ldp", "stp") else (kind,)
    if not re.search(r"\b[vqds]\d+\b", operands):
        return ("integer",)
    extra = ("shift",) if _SHIFT.fullmatch(name.rstrip("2")) else ("multiply",) if _MULTIPLY.match(name) else ()
    return ("vector", *extra)


def cycles(counts: Counter[str], core: Core) -> float:
    """The least cycles that a core needs for these instructions, whatever their order."""
    micro_operations = counts["load"] + counts["store"] + counts["integer"] + counts["vector"]
    return max(
        micro_operations / core.width,
        counts["vector"] / core.vectors,
        2 * counts["multiply"] / core.vectors,
        2 * counts["shift"] / core.vectors,
        counts["load"] / core.loads,
        counts["store"],
    )


def cascade(counts: list[int], widths: tuple[int, ...]) -> Code:
    """The cascade of these widths; its last level takes all symbols that are left."""
    symbols = rank(counts).symbols
    tree: Node | None = None
    for level in reversed(range(len(widths))):
        begin = sum(2**width - 1 for width in widths[:level])
        size = 2 ** widths[level] - (tree is not None)
        listed = symbols[begin : begin + size]
        tree = Field(widths[level], listed + symbols[-1:] * (size - len(listed)), tree)
    assert tree is not None
    return Code(tree)


def only(symbols: NDArray[np.uint8], allowed: int) -> NDArray[np.uint8]:
    """The commonest `allowed` symbols; rarer ones become the commonest."""
    ranked = rank([int(c) for c in _core.histogram(symbols)]).symbols
    return np.where(np.isin(symbols, ranked[:allowed]), symbols, ranked[0]).astype(np.uint8)


def main() -> None:
    """Count, print the table, and end with JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--build", type=Path, required=True, help="folder with the cross-built libentrollm_native.a")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        counter = InstructionCounter(arguments.build, Path(folder))
        for bits, patches in FLAT:
            by_isa = {isa: counter.count_flat(bits, patches, isa) for isa in ISAS}
            name = f"in memory: flat {bits}, {patches / 10} % patches" if patches else f"plain uint{bits}"
            rows.append(_report(name, None, by_isa, FLAT_ROWS * COLUMNS))
        for entropy, code, symbols in _cases():
            by_isa = {isa: counter.count(code, symbols, isa) for isa in ISAS}
            rows.append(_report(describe_code(code), entropy, by_isa, symbols.size))
    finish({"rows": rows}, arguments.json)


def _report(name: str, entropy: float | None, by_isa: dict[str, Counter[str]], weights: int) -> dict[str, Any]:
    """Print and return a row."""
    rates = {core.name: weights * core.gigahertz / cycles(by_isa[core.isa], core) for core in CORES}
    instructions = {isa: counts["all"] / weights for isa, counts in by_isa.items()}
    print(f"{name:36} H {'' if entropy is None else f'{entropy:.2f}':4}", *(f"{n:.2f}" for n in instructions.values()),
          *(f"{core} {rate:.2f}" for core, rate in rates.items()))  # fmt: skip
    return {
        "code": name,
        "entropy_bits": entropy,
        "instructions": instructions,
        "kinds": {isa: {k: n / weights for k, n in counts.items()} for isa, counts in by_isa.items()},
        "gweights_per_s": rates,
    }


def _cases() -> list[tuple[float, Code, NDArray[np.uint8]]]:
    found = []
    for widths, entropy in CASCADES:
        symbols = only(source(entropy, (ROWS, COLUMNS)), sum(2**width - 1 for width in widths) + 1)
        counts = [int(c) for c in _core.histogram(symbols)]
        found.append((entropy, cascade(counts, widths), symbols))
    for entropy in TREES:
        symbols = source(entropy, (ROWS, COLUMNS))
        counts = [int(c) * 1000 for c in _core.histogram(symbols)]
        found.append((entropy, choose_code(counts, 1000, "size"), symbols))
    return found


if __name__ == "__main__":
    main()
