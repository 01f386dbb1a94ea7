"""Decoding to bytes, and encoding: ours against zstd's Huffman coder (huff0) on the same symbols, one thread each.

usage: python benchmarks/decode.py [--mib N] [--repeats N] [--threads N] [--json FILE]

The symbols are drawn independently, so there is nothing for zstd to find but chance matches; without them its time is
that of huff0. All sides decode into memory that was touched before.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import numpy as np
import zstandard
from numpy.typing import NDArray

from common import Coded, Samples, finish, source, timed, wait_for_idle
from entrollm import _core
from entrollm.codec.blocks import choose_blocks
from entrollm.codec.choose import choose_code
from entrollm.compress.describe import describe_code
from entrollm.format.blocks import block_count

ENTROPIES = (1.47, 2.2, 3.0, 3.6, 4.4, 5.6)
COLUMNS = 4096
# zstd's levels, and level 1 with so small a table and so long a least match that nearly all is Huffman-coded.
ZSTD: dict[str, tuple[int, dict[str, int]]] = {
    "zstd -1": (1, {}),
    "zstd -3": (3, {}),
    "zstd literals": (1, {"window_log": 17, "hash_log": 6, "min_match": 7}),
}


def main() -> None:
    """Run, print the table, and end with JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mib", type=int, default=4, help="MiB of symbols, beyond the second-level cache")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1, help="for our decoder; zstd has one")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    rows = []
    print(f"{'source':>6} {'coder':28} {'bits':>6} {'decode':>6} {'median':>7} Gw/s {'GB/s in':>7} {'encode Gw/s':>11}")
    for entropy in ENTROPIES:
        symbols = source(entropy, (arguments.mib * 2**20 // COLUMNS, COLUMNS))
        rows += measure_source(entropy, symbols, arguments.threads, arguments.repeats)
    finish({"benchmark": "decode", "threads": arguments.threads, "rows": rows}, arguments.json)


def measure_source(entropy: float, symbols: NDArray[np.uint8], threads: int, repeats: int) -> list[dict[str, Any]]:
    """Time all coders on one source, taking turns."""
    coders: list[Ours | Zstd] = [
        Ours(symbols, "speed", threads),
        Ours(symbols, "size", threads),
        *(Zstd(symbols, n) for n in ZSTD),
    ]
    decode = [Samples() for _ in coders]
    encode = [Samples() for _ in coders]
    for coder in coders:
        if not np.array_equal(coder.decode(), symbols.ravel()):
            raise AssertionError(f"{coder.name} does not give the symbols back")
        coder.encode()
    wait_for_idle()
    for _ in range(repeats):
        for coder, samples in zip(coders, decode, strict=True):
            samples.run(timed(coder.decode))
    for _ in range(max(3, repeats // 3)):
        for coder, samples in zip(coders, encode, strict=True):
            samples.run(timed(coder.encode))
    rows = []
    for coder, decoded, encoded in zip(coders, decode, encode, strict=True):
        row = {
            "entropy_bits": entropy,
            "coder": coder.name,
            "code": coder.code,
            "stored_bits": 8 * coder.size_bytes / symbols.size,
            "weights": symbols.size,
            "decode": decoded.summary(),
            "encode": encoded.summary(),
            "choose_code_s": coder.choose_s,
        }
        rows.append(row)
        rate, median = (symbols.size / row["decode"][key] / 1e9 for key in ("best_s", "median_s"))
        print(
            f"{entropy:6} {coder.name + ' ' + coder.code:28} {row['stored_bits']:6.3f} {rate:6.2f} {median:7.2f}      "
            f"{rate * row['stored_bits'] / 8:7.2f} {symbols.size / row['encode']['best_s'] / 1e9:11.2f}"
        )
    return rows


class Ours:
    """Our coder with one preference."""

    def __init__(self, symbols: NDArray[np.uint8], prefer: Any, threads: int) -> None:
        self.name = f"entrollm {prefer}"
        self._symbols = symbols
        rows, columns = symbols.shape
        self._blocks = choose_blocks(rows, columns)
        counts = [int(c) for c in _core.histogram(symbols)]
        start = time.perf_counter()
        choose_code(counts, block_count(rows, columns, self._blocks), prefer)
        self.choose_s = time.perf_counter() - start
        self._coded = Coded(symbols, 1, prefer)
        self._pool = _core.ThreadPool(threads)
        self.code = describe_code(self._coded.code)
        self.size_bytes = round(self._coded.bits * symbols.size / 8)

    def decode(self) -> NDArray[np.uint8]:
        """All symbols."""
        return self._coded.matrix.decode(0, self._coded.rows, self._pool).ravel()

    def encode(self) -> object:
        """The streams."""
        code = self._coded.code
        return _core.encode(code.program(), code.low_bits, self._symbols, self._blocks.rows, self._blocks.columns)


class Zstd:
    """zstd with some settings."""

    choose_s = 0.0
    code = ""

    def __init__(self, symbols: NDArray[np.uint8], name: str) -> None:
        self.name = name
        self._bytes = symbols.tobytes()
        level, settings = ZSTD[name]
        self._parameters = zstandard.ZstdCompressionParameters.from_level(level, **settings)
        self._stream = self.encode()
        self.size_bytes = len(self._stream)
        self._buffer = np.empty(symbols.size, np.uint8)

    def encode(self) -> bytes:
        """The frame."""
        return zstandard.ZstdCompressor(compression_params=self._parameters).compress(self._bytes)

    def decode(self) -> NDArray[np.uint8]:
        """All symbols."""
        with zstandard.ZstdDecompressor().stream_reader(self._stream, read_size=1 << 20) as reader:
            read = 0
            while read < self._buffer.size:
                read += reader.readinto(self._buffer.data[read:])
        return self._buffer


if __name__ == "__main__":
    main()
