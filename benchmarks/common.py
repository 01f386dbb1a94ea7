"""What the benchmarks share: sources of stated entropy, coded matrices, timing, and the JSON they end with."""

from __future__ import annotations

import datetime
import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from entrollm import _core
from entrollm.codec.blocks import choose_blocks
from entrollm.codec.choose import Prefer, choose_code
from entrollm.codec.huffman import entropy_bits, huffman_bits
from entrollm.format.blocks import block_count
from entrollm.format.code import Code
from entrollm.format.layout import padded_stream

SEED = 20260
NO_STREAM = np.zeros(_core.SLACK_BYTES, np.uint8)


def source(entropy: float, shape: tuple[int, int], distribution: str = "gauss") -> NDArray[np.uint8]:
    """Random symbols of a given entropy (bits): a uniform grid over Gaussian or Student-t (8) weights."""
    rng = np.random.default_rng(SEED)
    weights = rng.standard_normal(shape) if distribution == "gauss" else rng.standard_t(8, shape)
    # A million weights tell the entropy to a few thousandths of a bit.
    some = weights.reshape(1, -1)[:, : 1 << 20]
    low, high = 1e-3, 10.0
    for _ in range(30):
        step = (low * high) ** 0.5
        if entropy_bits([int(c) for c in _core.histogram(_on_grid(some, step))]) > entropy:
            low = step
        else:
            high = step
    return _on_grid(weights, high)


def _on_grid(weights: NDArray[np.float64], step: float) -> NDArray[np.uint8]:
    symbols: NDArray[np.uint8] = np.clip(np.rint(weights / step) + 128, 0, 255).astype(np.uint8)
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
        self.code = code or choose_code(counts, block_count(rows, columns, blocks), prefer, can_be_flat=False)
        self.huffman_bits = huffman_bits(counts)
        self.entropy_bits = entropy_bits(counts)
        dense, sparse, sizes = _core.encode(
            self.code.program(), self.code.low_bits, symbols, blocks.rows, blocks.columns
        )
        self.weights = symbols.size * repeat
        stored = dense.nbytes + sparse.nbytes + (sizes.nbytes if sparse.size else 0)
        self.bits = stored * 8 / symbols.size
        streams = [np.tile(dense, repeat), np.tile(sparse, repeat)]
        self.dense, self.sparse = (aligned(padded_stream([stream])) if stream.size else NO_STREAM for stream in streams)
        self.rows, self.columns = rows * repeat, columns
        self.matrix = _core.CodedMatrix(
            self.code.program(),
            self.code.low_bits,
            _core.Geometry(self.rows, columns, blocks.rows, blocks.columns),
            self.dense,
            self.sparse,
            np.tile(sizes, repeat) if sparse.size else sizes[:0],
            np.ones(1, np.float32),
            None,
            None,
        )


class OtherLoad:
    """What the rest of the machine does meanwhile: the share of its cores that other processes and guests take."""

    def __init__(self) -> None:
        self._start = _busy_s(), _own_s(), time.perf_counter()

    def share(self) -> float:
        """Since this object was made; to about 10 ms of a core."""
        busy, own, now = self._start
        elapsed = (time.perf_counter() - now) * (os.cpu_count() or 1)
        return max(0.0, (_busy_s() - busy - (_own_s() - own)) / elapsed) if elapsed > 0 else 0.0


def wait_for_idle(limit_s: float = 1.0, share: float = 0.1) -> None:
    """Wait until other processes leave the machine alone, at most `limit_s` seconds."""
    end = time.monotonic() + limit_s
    while time.monotonic() < end:
        load = OtherLoad()
        time.sleep(0.3)
        if load.share() < share:
            return


def _busy_s() -> float:
    fields = [int(v) for v in Path("/proc/stat").read_text().splitlines()[0].split()[1:9]]
    user, nice, system, _idle, _iowait, irq, softirq, steal = fields
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


def _own_s() -> float:
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


@dataclass
class Samples:
    """Seconds of repeated runs, and how busy other processes kept the machine during each."""

    seconds: list[float] = field(default_factory=list)
    others: list[float] = field(default_factory=list)

    def run(self, run: Callable[[], float], repeats: int = 1) -> None:
        """Add runs; `run` returns its seconds. Their common load is noted, runs being shorter than the clock tick."""
        load = OtherLoad()
        self.seconds.extend(run() for _ in range(repeats))
        self.others.extend([load.share()] * repeats)

    def summary(self) -> dict[str, float]:
        """Best, median and quartiles, in seconds, and the median share that others took of the machine."""
        return {**spread(self.seconds, "_s"), "others": statistics.median(self.others), "runs": len(self.seconds)}


def spread(values: Sequence[float], unit: str = "") -> dict[str, float]:
    """The least, median and quartiles of some values."""
    ordered = sorted(values)
    quarter = len(ordered) // 4
    return {
        f"best{unit}": ordered[0],
        f"median{unit}": statistics.median(ordered),
        f"q1{unit}": ordered[quarter],
        f"q3{unit}": ordered[-1 - quarter],
    }


def timed(run: Callable[[], object]) -> Callable[[], float]:
    """A function that runs `run` and returns its seconds."""

    def call() -> float:
        start = time.perf_counter()
        run()
        return time.perf_counter() - start

    return call


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
    return {
        "processor": model,
        "machine": platform.machine(),
        "cores": os.cpu_count(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "isa": _core.isa(),
        "commit": commit,
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
    }


def finish(results: dict[str, Any], path: Path | None) -> None:
    """Print the JSON object that ends a benchmark, and write it where asked."""
    text = json.dumps({"environment": environment(), **results}, indent=1)
    print(text)
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")
