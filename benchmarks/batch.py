"""The cost of a batch: products of several vectors over products of one, with the matrices of the 1.1B shape.

usage: python benchmarks/batch.py [--entropy BITS] [--repeats N] [--threads N] [--json FILE]
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from common import SEED, Coded, Samples, finish, source, timed, wait_for_idle
from entrollm import _core
from entrollm.compress.describe import describe_code
from entrollm.threads import default_threads

# (name, rows, columns, products per pass through the model)
MATRICES = (
    ("qkv", 2560, 2048, 22),
    ("output", 2048, 2048, 22),
    ("gate and up", 11264, 2048, 22),
    ("down", 2048, 5632, 22),
    ("head", 32000, 2048, 1),
)
BATCHES = (1, 2, 4, 8, 512)
GOAL_BATCH = 1.3


def main() -> None:
    """Run, print the table, and end with JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--entropy", type=float, default=3.15)
    parser.add_argument("--prefer", default="speed")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--threads", type=int, default=default_threads())
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    pool = _core.ThreadPool(arguments.threads)
    rows = []
    print(f"{arguments.threads} thread(s); milliseconds of a product at best, and its ratio to one vector's")
    print(f"{'matrix':12} {'code':16}" + "".join(f"{f'batch {n}':>18}" for n in BATCHES))
    for name, height, width, _ in MATRICES:
        # Several layers of each kind in turn, so that no matrix stays in a cache of its core.
        layers = 1 if name == "head" else 4
        coded = [Coded(source(arguments.entropy, (height, width)), 1, arguments.prefer) for _ in range(layers)]
        times = measure_matrix(coded, pool, arguments.repeats)
        rows.append({"matrix": name, "code": describe_code(coded[0].code), "stored_bits": coded[0].bits, **times})
        print(f"{name:12} {rows[-1]['code']:16}" + cells({n: times[f"batch_{n}"]["best_s"] for n in BATCHES}))
    total = {
        n: sum(count * row[f"batch_{n}"]["best_s"] for row, (*_, count) in zip(rows, MATRICES, strict=True))
        for n in BATCHES
    }
    print(f"{'model':29}" + cells(total))
    print(f"goal: at most {GOAL_BATCH} up to batch 8")
    finish(
        {
            "benchmark": "batch",
            "threads": arguments.threads,
            "entropy_bits": arguments.entropy,
            "rows": rows,
            "model_s": {str(n): seconds for n, seconds in total.items()},
        },
        arguments.json,
    )


def measure_matrix(coded: list[Coded], pool: _core.ThreadPool, repeats: int) -> dict[str, Any]:
    """Time products of all batch sizes in turn, each over every layer; seconds are of one layer."""
    rng = np.random.default_rng(SEED)
    inputs = {n: rng.standard_normal((n, coded[0].columns)).astype(np.float32) for n in BATCHES}
    samples = {n: Samples() for n in BATCHES}
    verify(coded[0], inputs, pool)

    def product(x: NDArray[np.float32]) -> Callable[[], float]:
        call = timed(lambda: [layer.matrix.multiply(x, pool) for layer in coded])
        return lambda: call() / len(coded)

    wait_for_idle()
    for repeat in range(repeats):
        for n in BATCHES:
            if n < 64 or repeat < 3:
                samples[n].run(product(inputs[n]))
    return {f"batch_{n}": samples[n].summary() for n in BATCHES}


def verify(coded: Coded, inputs: dict[int, NDArray[np.float32]], pool: _core.ThreadPool) -> None:
    """Check the products against float64 products of the decoded weights."""
    weights = coded.matrix.dequantize(np.arange(min(256, coded.rows)), pool).astype(np.float64)
    for n, x in inputs.items():
        expected = x.astype(np.float64) @ weights.T
        found = coded.matrix.multiply(x, pool)[:, : len(weights)]
        # Activations are rounded to 16 bits of the largest; the sum of many such errors stays far below this.
        limit = 1e-4 * np.abs(x).max() * np.abs(weights).sum(axis=1).max()
        if not np.abs(found - expected).max() <= limit:
            raise AssertionError(f"batch {n}: the product is off by {np.abs(found - expected).max()}")


def cells(seconds: dict[int, float]) -> str:
    """Milliseconds and ratios."""
    return "".join(f"{1e3 * s:11.3f} {s / seconds[1]:5.2f}x" for s in seconds.values())


if __name__ == "__main__":
    main()
