"""What the benchmarks share: sources of stated entropy, coded matrices, timing, and the JSON they end with."""

from __future__ import annotations

import json
import platform
import statistics
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from entrollm import _core
from entrollm.codec.blocks import block_count, choose_blocks
from entrollm.codec.choose import Prefer, choose_code
from entrollm.codec.huffman import entropy_bits, huffman_bits
from entrollm.container.layout import padded_stream
from entrollm.specs import Code

SEED = 20260
NO_STREAM = np.zeros(_core.SLACK_BYTES, np.uint8)


def source(entropy: float, shape: tuple[int, int], distribution: str = "gauss") -> NDArray[np.uint8]:
    """Random symbols of a given entropy (bits): a uniform grid over Gaussian or Student-t (8) weights."""
    rng = np.random.default_rng(SEED)
    weights = rng.standard_normal(shape) if distribution == "gauss" else rng.standard_t(8, shape)
    low, high = 1e-3, 10.0
    for _ in range(40):
        step = (low * high) ** 0.5
        symbols = np.clip(np.rint(weights / step) + 128, 0, 255).astype(np.uint8)
        if entropy_bits([int(c) for c in _core.histogram(symbols)]) > entropy:
            low = step
        else:
            high = step
    return symbols


def aligned(array: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """A copy that begins a page, as streams do in a memory map."""
    page = 4096
    memory = np.empty(array.size + page, np.uint8)
    begin = -memory.ctypes.data % page
    memory[begin : begin + array.size] = array
    return memory[begin : begin + array.size]


class Coded:
    """A coded matrix of many rows, made by repeating the coded bytes of a few: distinct memory, real content."""

    def __init__(self, symbols: NDArray[np.uint8], repeat: int, prefer: Prefer, code: Code | None = None) -> None:
        rows, columns = symbols.shape
        blocks = choose_blocks(rows, columns)
        if rows % blocks.rows:
            raise ValueError(f"{rows} rows do not fill groups of {blocks.rows}")
        counts = [int(c) for c in _core.histogram(symbols)]
        self.code = code or choose_code(counts, block_count(rows, columns, blocks), prefer)
        self.huffman_bits = huffman_bits(counts)
        self.entropy_bits = entropy_bits(counts)
        dense, sparse, sizes = _core.encode(
            self.code.program(), self.code.low_bits, symbols, blocks.rows, blocks.columns
        )
        self.weights = symbols.size * repeat
        stored = dense.nbytes + sparse.nbytes + (sizes.nbytes if sparse.size else 0)
        self.bits = stored * 8 / symbols.size
        streams = [np.tile(dense, repeat), np.tile(sparse, repeat)]
        self.arrays = [aligned(padded_stream([stream])) if stream.size else NO_STREAM for stream in streams]
        self.rows, self.columns = rows * repeat, columns
        self.matrix = _core.CodedMatrix(
            self.code.program(),
            self.code.low_bits,
            _core.Geometry(self.rows, columns, blocks.rows, blocks.columns),
            *self.arrays,
            np.tile(sizes, repeat) if sparse.size else sizes[:0],
            np.ones(1, np.float32),
            None,
            None,
        )


def measure(run: Callable[[], float], repeats: int) -> dict[str, float]:
    """Best, median and quartiles of the seconds that `run` returns, after one warm-up."""
    run()
    times = sorted(run() for _ in range(repeats))
    quarter = len(times) // 4
    return {
        "best_s": times[0],
        "median_s": statistics.median(times),
        "q1_s": times[quarter],
        "q3_s": times[-1 - quarter],
        "runs": float(repeats),
    }


def environment() -> dict[str, Any]:
    """Hardware, instruction set and commit."""
    model = ""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        lines = cpuinfo.read_text().splitlines()
        model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "")
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False, cwd=Path(__file__).parent
    ).stdout.strip()
    return {"processor": model, "machine": platform.machine(), "isa": _core.isa(), "commit": commit}


def finish(results: dict[str, Any], path: Path | None) -> None:
    """Print the JSON object that ends a benchmark, and write it where asked."""
    text = json.dumps({"environment": environment(), **results}, indent=1)
    print(text)
    if path is not None:
        path.write_text(text + "\n")
