"""Fused decode + product (batch 1) over int8, int4 and bf16 products at full width, streamed from memory.

usage: python benchmarks/gemv.py [--gib N] [--repeats N] [--json FILE] [--threads 1 2]
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from baselines import Baselines
from common import SEED, Coded, aligned, finish, measure, source
from entrollm import _core
from entrollm.compress.describe import describe_code

# (largest stored bits, entropy of the source, goal over int8 for 1 and 2 threads)
GOALS = (
    (1.75, 1.47, 1.6, 2.0),
    (2.45, 2.2, 1.7, 2.0),
    (3.25, 3.0, 1.8, 2.0),
    (3.90, 3.6, 1.6, 1.8),
    (4.65, 4.4, 1.8, 1.9),
    (5.85, 5.6, 1.0, 1.2),
)
ROWS, COLUMNS = 2048, 4096


def main() -> None:
    """Run, print the table, and end with JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gib", type=float, default=1.0, help="GiB of int8 weights that every product reads")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--prefer", default="speed")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    repeat = max(1, round(arguments.gib * 2**30 / (ROWS * COLUMNS)))
    rng = np.random.default_rng(SEED)
    x = rng.standard_normal((1, COLUMNS)).astype(np.float32)
    full = aligned(np.tile(source(5.6, (ROWS, COLUMNS)).ravel(), repeat))
    int8 = aligned(rng.integers(0, 255, COLUMNS).astype(np.uint8)).view(np.int8)
    coded = [(goal, Coded(source(goal[1], (ROWS, COLUMNS)), repeat, arguments.prefer)) for goal in GOALS]
    baselines = Baselines()
    rows = []
    for threads in arguments.threads:
        run = Run(baselines, full, int8, x, threads, arguments.repeats)
        times = {name: run.baseline(name) for name in ("read", "int8", "int4", "bf16")}
        for goal, matrix in coded:
            timed = run.coded(matrix)
            # Baselines and products take turns, so that both see the same machine; the baseline's best counts.
            times["int8"]["best_s"] = min(times["int8"]["best_s"], run.baseline("int8")["best_s"])
            rows.append((threads, goal, matrix, timed))
        report(threads, rows, times, full.size)
    finish({"rows": [to_json(*row) for row in rows]}, arguments.json)


@dataclass(frozen=True)
class Run:
    """Timed products with one number of threads."""

    baselines: Baselines
    full: NDArray[np.uint8]
    int8: NDArray[np.int8]
    x: NDArray[np.float32]
    threads: int
    repeats: int

    def baseline(self, name: str) -> dict[str, float]:
        """Time a full-width product."""
        x = self.x if name == "bf16" else self.int8
        return measure(lambda: self.baselines.product(name, self.full, COLUMNS, x, self.threads), self.repeats)

    def coded(self, matrix: Coded) -> dict[str, float]:
        """Time a coded product."""
        pool = _core.ThreadPool(self.threads)

        def product() -> float:
            start = time.perf_counter()
            matrix.matrix.multiply(self.x, pool)
            return time.perf_counter() - start

        return measure(product, self.repeats)


def report(threads: int, rows: list, times: dict, weights: int) -> None:
    """Print one thread count's table."""
    int8_rate = weights / times["int8"]["best_s"] / 1e9
    read_rate = weights / times["read"]["best_s"] / 1e9
    print(f"\n{threads} thread(s): read {read_rate:.1f} GB/s; Gweights/s at best: int8 {int8_rate:.1f}, ", end="")
    int4_rate = 2 * weights / times["int4"]["best_s"] / 1e9
    bf16_rate = weights / 2 / times["bf16"]["best_s"] / 1e9
    print(f"int4 {int4_rate:.1f}, bf16 {bf16_rate:.1f}")
    print(
        f"{'code':24} {'Huffman':>8} {'stored':>7} {'Gw/s':>6} {'median':>7} {'x int8':>7} {'goal':>5} {'of read':>8}"
    )
    for used, goal, matrix, timed in rows:
        if used != threads:
            continue
        best = matrix.weights / timed["best_s"] / 1e9
        share = best * matrix.bits / 8 / read_rate
        wanted = goal[1 + threads] if threads <= 2 else float("nan")
        print(
            f"{describe_code(matrix.code):24} {matrix.huffman_bits:8.3f} {matrix.bits:7.3f} {best:6.1f} "
            f"{matrix.weights / timed['median_s'] / 1e9:7.1f} {best / int8_rate:7.2f} {wanted:5.1f} {100 * share:7.0f}%"
        )
        timed["x_int8"] = best / int8_rate


def to_json(threads: int, goal: tuple, matrix: Coded, timed: dict) -> dict:
    """One row of the result."""
    return {
        "threads": threads,
        "entropy_bits": matrix.entropy_bits,
        "huffman_bits": matrix.huffman_bits,
        "stored_bits": matrix.bits,
        "code": describe_code(matrix.code),
        "weights": matrix.weights,
        **timed,
    }


if __name__ == "__main__":
    main()
