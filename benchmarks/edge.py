"""What boards can be expected to reach, projected from counted instructions and published bandwidths.

usage: python benchmarks/edge.py COUNTS.json [--weights N]

COUNTS.json is what `benchmarks/arm/count.py --json` writes. Nothing here is measured on a board: a rate is the lower
one of what all cores can issue at best and what the memory delivers. The table is Markdown.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Board:
    """Published figures: cores of a kind that count.py knows, their clock over the one there, and peak bandwidth."""

    name: str
    cores: int
    core: str
    clock_ratio: float
    gigabytes_per_s: float


BOARDS = (
    Board("Jetson Nano", 4, "Cortex-A57", 1.0, 25.6),
    Board("Raspberry Pi 4", 4, "Cortex-A72", 1.0, 12.8),
    Board("Raspberry Pi 5", 4, "Cortex-A76", 1.0, 17.1),
    Board("Jetson Orin Nano", 6, "Cortex-A76", 1.5 / 2.4, 68.0),  # its A78AE are A76 here
)
# Of the peak, what a product that streams weights can use; such boards' copies reach a third to two thirds.
SUSTAINED = 0.5
# Name, the row of COUNTS.json, and stored bits. A patch takes 32 bits, a code about 2 % more than its entropy.
FORMS = (
    ("uint8", "plain uint8", 8.0),
    ("uint8, Huffman (the paper's)", "Huffman tree at 5.6", 5.7),
    ("uint4", "plain uint4", 4.0),
    ("uint4, cascade at 1.47 bits (the paper's grid)", "1-1-1-2", 1.5),
    ("3.0 bits, cascade in the file", "3-2-3", 3.1),
    ("3.0 bits, flat 4 in memory", "in memory: flat 4, 0.7 % patches", 4.22),
    ("2.2 bits, flat 3 in memory", "in memory: flat 3, 0.8 % patches", 3.26),
)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("counts", type=Path)
    parser.add_argument("--weights", type=float, default=1.1, help="billions of weights of the model")
    arguments = parser.parse_args()
    rows = rates_by_form(json.loads(arguments.counts.read_text())["rows"])
    print("| projected tokens/s | bits | " + " | ".join(board.name for board in BOARDS) + " |")
    print("|---|---|" + "---|" * len(BOARDS))
    plain = [project(board, rows[FORMS[0][1]], FORMS[0][2]) for board in BOARDS]
    for name, key, bits in FORMS:
        cells = []
        for board, base in zip(BOARDS, plain, strict=True):
            rate = project(board, rows[key], bits)
            bound = "memory" if rate < instruction_rate(board, rows[key]) else "cores"
            cells.append(f"{rate / arguments.weights:.1f} ({rate / base:.2f}, {bound})")
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


def instruction_rate(board: Board, rates: Mapping[str, float]) -> float:
    """Gweights/s that all cores can issue at best."""
    return board.cores * board.clock_ratio * rates[board.core]


def project(board: Board, rates: Mapping[str, float], bits: float) -> float:
    """Gweights/s of a product."""
    return min(instruction_rate(board, rates), SUSTAINED * board.gigabytes_per_s * 8 / bits)


if __name__ == "__main__":
    main()
