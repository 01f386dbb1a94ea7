"""Products with one vector, fused with decoding and from the flat form in memory, over int8, int4 and bf16 ones.

usage: python benchmarks/gemv.py [--gib N] [--repeats N] [--json FILE] [--threads 1 2]
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from baselines import Baselines
from common import SEED, Coded, Samples, aligned, finish, source, timed, wait_for_idle
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
# Full-width products and the bytes of one weight.
BASELINES = {"read": 1.0, "int8": 1.0, "int4": 0.5, "bf16": 2.0}
ROWS, COLUMNS = 2048, 4096
_TURN = 4


def main() -> None:
    """Run, print the table, and end with JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gib", type=float, default=1.0, help="GiB of int8 weights that every product reads")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--prefer", default="speed")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    repeat = max(1, round(arguments.gib * 2**30 / (ROWS * COLUMNS)))
    rng = np.random.default_rng(SEED)
    x = rng.standard_normal((1, COLUMNS)).astype(np.float32)
    full = aligned(np.tile(source(5.6, (ROWS, COLUMNS)).ravel(), repeat))
    int8 = aligned(rng.integers(0, 255, COLUMNS).astype(np.uint8)).view(np.int8)
    # As many bytes of bf16 numbers; other bytes would be denormal numbers, which are slow.
    some = rng.standard_normal(ROWS * COLUMNS // 2).astype(ml_dtypes.bfloat16)
    bf16 = aligned(np.tile(some.view(np.uint8), repeat))
    coded = [(goal, Coded(source(goal[1], (ROWS, COLUMNS)), repeat, arguments.prefer)) for goal in GOALS]
    flat = [_core.FlatMatrix(matrix.matrix, _core.ThreadPool(max(arguments.threads))) for _, matrix in coded]
    baselines = Baselines()
    for (_, matrix), other in zip(coded, flat, strict=True):
        verify(matrix, other, x)
    rows: list[dict[str, Any]] = []
    baseline_rows = []
    for threads in arguments.threads:
        run = Run(baselines, full, bf16, int8, x, threads)
        calls = [run.baseline(name) for name in BASELINES]
        calls += [run.coded(matrix.matrix) for _, matrix in coded] + [run.coded(matrix) for matrix in flat]
        found_all = take_turns(calls, arguments.repeats)
        times = dict(zip(BASELINES, found_all, strict=False))
        first = len(BASELINES)
        measured = zip(coded, found_all[first : first + len(coded)], flat, found_all[first + len(coded) :], strict=True)
        rates = {name: rate(name, full.size, found["best_s"]) for name, found in times.items()}
        baseline_rows += [
            {"threads": threads, "name": name, "rate": rates[name], **found} for name, found in times.items()
        ]
        rows += [
            to_json(threads, *pair, found, rates) | flat_to_json(pair[1], other, other_found, rates)
            for pair, found, other, other_found in measured
        ]
        report(threads, rows, rates)
    finish(
        {
            "benchmark": "gemv",
            "prefer": arguments.prefer,
            "columns": COLUMNS,
            "int8_bytes": full.size,
            "baselines": baseline_rows,
            "rows": rows,
        },
        arguments.json,
    )


def verify(matrix: Coded, flat: _core.FlatMatrix, x: NDArray[np.float32]) -> None:
    """Check the first rows of a product against float64, and all of the flat one against the coded one."""
    pool = _core.ThreadPool(1)
    if not np.array_equal(flat.multiply(x, pool), matrix.matrix.multiply(x, pool)):
        raise AssertionError(f"{describe_code(matrix.code)}: the flat product differs")
    weights = matrix.matrix.dequantize(np.arange(256), pool).astype(np.float64)
    error = np.abs(matrix.matrix.multiply(x, pool)[0, :256] - weights @ x[0])
    # Activations are rounded to 16 bits of the largest.
    if not error.max() <= 1e-4 * np.abs(x).max() * np.abs(weights).sum(axis=1).max():
        raise AssertionError(f"{describe_code(matrix.code)}: the product is off by {error.max()}")


def rate(name: str, size_bytes: int, seconds: float) -> float:
    """Gweights (for "read", gigabytes) per second of a full-width product over some bytes."""
    return size_bytes / BASELINES[name] / seconds / 1e9


def take_turns(calls: Sequence[Callable[[], float]], repeats: int) -> list[dict[str, float]]:
    """Time all in turns of a few runs, so that all see the same machine, and summarise each."""
    samples = [Samples() for _ in calls]
    for _ in range(-(-repeats // _TURN)):
        wait_for_idle()
        for call, found in zip(calls, samples, strict=True):
            call()
            found.run(call, _TURN)
    return [found.summary() for found in samples]


class Run:
    """Timed products with one number of threads."""

    def __init__(
        self,
        baselines: Baselines,
        full: NDArray[np.uint8],
        bf16: NDArray[np.uint8],
        int8: NDArray[np.int8],
        x: NDArray[np.float32],
        threads: int,
    ) -> None:
        self._baselines = baselines
        self._inputs = dict.fromkeys(BASELINES, (full, int8)) | {"bf16": (bf16, x)}
        self._x = x
        self._threads = threads
        self._pool = _core.ThreadPool(threads)

    def baseline(self, name: str) -> Callable[[], float]:
        """A full-width product."""
        weights, x = self._inputs[name]
        return lambda: self._baselines.product(name, weights, COLUMNS, x, self._threads)

    def coded(self, matrix: _core.CodedMatrix | _core.FlatMatrix) -> Callable[[], float]:
        """A coded product, or a flat one."""
        return timed(lambda: matrix.multiply(self._x, self._pool))


def report(threads: int, rows: list[dict[str, Any]], rates: dict[str, float]) -> None:
    """Print one thread count's table."""
    print(f"\n{threads} thread(s): read {rates['read']:.1f} GB/s; Gweights/s at best: ", end="")
    print(", ".join(f"{name} {value:.1f}" for name, value in rates.items() if name != "read"))
    print(
        f"{'code':24} {'Huffman':>8} {'stored':>7} {'Gw/s':>6} {'median':>7} {'x int8':>7} {'goal':>5} {'of read':>8}"
        f" {'flat':>6} {'Gw/s':>6} {'x int8':>7}"
    )
    for row in rows:
        if row["threads"] != threads:
            continue
        print(
            f"{row['code']:24} {row['huffman_bits']:8.3f} {row['stored_bits']:7.3f} {row['rate']:6.1f} "
            f"{row['weights'] / row['median_s'] / 1e9:7.1f} {row['x_int8']:7.2f} {row['goal'] or math.nan:5.1f} "
            f"{100 * row['of_read']:7.0f}% {row['flat_bits']:6.3f} {row['flat_rate']:6.1f} {row['flat_x_int8']:7.2f}"
        )


def to_json(
    threads: int, goal: tuple[float, ...], matrix: Coded, timed: dict[str, float], rates: dict[str, float]
) -> dict[str, Any]:
    """One row of the result."""
    best = matrix.weights / timed["best_s"] / 1e9
    return {
        "threads": threads,
        "entropy_bits": matrix.entropy_bits,
        "huffman_bits": matrix.huffman_bits,
        "stored_bits": matrix.bits,
        "goal_bits": goal[0],
        "code": describe_code(matrix.code),
        "weights": matrix.weights,
        "rate": best,
        "x_int8": best / rates["int8"],
        "goal": goal[1 + threads] if threads <= 2 else None,
        "of_read": best * matrix.bits / 8 / rates["read"],
        **timed,
    }


def flat_to_json(
    matrix: Coded, flat: _core.FlatMatrix, timed: dict[str, float], rates: dict[str, float]
) -> dict[str, Any]:
    """What a row of the result says about the flat form."""
    best = matrix.weights / timed["best_s"] / 1e9
    return {
        "flat_bits": flat.size_bytes * 8 / matrix.weights,
        "flat_rate": best,
        "flat_x_int8": best / rates["int8"],
        "flat": timed,
    }


if __name__ == "__main__":
    main()
