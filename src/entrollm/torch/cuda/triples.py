"""The code that the GPU decodes: a symbol is raw low bits and a high part, and three high parts share a codeword."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from entrollm.codec.huffman import entropy_bits, limited_lengths

MAX_LENGTH = 8
HIGH_BITS = 3
HIGH_PARTS = 1 << HIGH_BITS
TRIPLE = 3
PATCH_BITS = 32

_MAX_RAW_BITS = 7
# Sizes of the table to try. A triple that is not in the table costs a patch.
_TABLE_SIZES = (1, 8, 27, 48, 64, 100, 128, 160, 224, 256)
# Splits are priced exactly if their bound is at most this far above the lowest, in bits. There is one split for each
# number of raw bits.
_NEAR_BITS = 0.3
# Counts are scaled to this total before code lengths are made.
_TOTAL = 1 << 30


@dataclass(frozen=True)
class TripleCode:
    """How a symbol is split, and the prefix code of three high parts.

    A symbol s is (high << raw_bits) + raw + base with raw in [0, 2^raw_bits) and high in [0, 8); three high parts,
    the first in the highest bits, make a triple in [0, 512). A triple that is not in the table is stored as one that
    is, and patched.

    Attributes:
        raw_bits: 0 to 7.
        base: the smallest symbol that needs no patch, which may be negative.
        codewords: uint8, shape (512,), the first bit lowest.
        lengths: uint8, shape (512,), 1 to 8, the bits of each codeword.
        stored: int64, shape (512,), the triple that each triple is stored as.
        likeliest: the likeliest high part; the triple of three of it is in the table.
        bits: expected bits per weight, including patches but not the starts of segments.
    """

    raw_bits: int
    base: int
    codewords: NDArray[np.uint8]
    lengths: NDArray[np.uint8]
    stored: NDArray[np.int64]
    likeliest: int
    bits: float

    def table(self) -> NDArray[np.uint32]:
        """What the next 8 bits decode to: the codeword's length, then three bytes `high << raw_bits`; shape (256,)."""
        table = np.zeros(1 << MAX_LENGTH, np.uint32)
        for triple in np.unique(self.stored):
            length = int(self.lengths[triple])
            highs = high_parts(triple).tolist()
            entry = length + sum(high << self.raw_bits + 8 * (i + 1) for i, high in enumerate(highs))
            table[int(self.codewords[triple]) :: 1 << length] = entry
        return table


def choose_triple_code(counts: Sequence[int]) -> TripleCode:
    """Find the split and the code with the fewest bits, for symbols that are independent of their neighbours.

    Args:
        counts: how often each of 256 symbols occurs; at least one must be positive.
    """
    shares = np.asarray(counts, np.float64)
    shares /= shares.sum()
    splits: list[_Split] = []
    limit = math.inf
    for raw_bits in range(_MAX_RAW_BITS + 1):
        if raw_bits + 1 / TRIPLE > limit:
            break  # no split with more raw bits is better
        splits.append(_split(shares, raw_bits))
        limit = min(limit, splits[-1].bound + _NEAR_BITS)
    tables = [table for split in splits if split.bound <= limit for table in _tables(split)]
    best: tuple[float, _Table, NDArray[np.int64]] | None = None
    for table in sorted(tables, key=lambda table: table.bound):
        if best is not None and table.bound >= best[0]:
            break  # nor is any after it better
        lengths = _lengths(table.shares[table.held])
        bits = table.bits(lengths)
        if best is None or bits < best[0]:
            best = bits, table, lengths
    assert best is not None
    return _code(best[1], best[2], best[0])


@dataclass(frozen=True)
class _Split:
    raw_bits: int
    base: int
    highs: NDArray[np.float64]  # shares of the 8 high parts, which may add up to less than 1
    bound: float


def _split(shares: NDArray[np.float64], raw_bits: int) -> _Split:
    """Find the best split with a number of raw bits. The high part must fit in a byte together with them."""
    cell = 1 << raw_bits
    width = min(HIGH_PARTS, 256 // cell)
    splits = []
    for phase in range(cell):
        padded = np.concatenate([np.zeros(phase), shares, np.zeros(-(len(shares) + phase) % cell)])
        cells = np.concatenate([padded.reshape(-1, cell).sum(1), np.zeros(HIGH_PARTS)])
        windows = np.lib.stride_tricks.sliding_window_view(cells, width)
        first = int(np.argmax(windows.sum(1)))
        highs = np.pad(windows[first], (0, HIGH_PARTS - width))
        kept = float(highs.sum())
        bound = raw_bits + max(entropy_bits(highs.tolist()), 1 / TRIPLE) + (1 - kept) * PATCH_BITS
        splits.append(_Split(raw_bits, first * cell - phase, highs, bound))
    return min(splits, key=lambda split: split.bound)


@dataclass(frozen=True)
class _Table:
    """The triples of a split that a code has codewords for, before these have lengths."""

    split: _Split
    shares: NDArray[np.float64]  # of 512 triples
    held: NDArray[np.int64]
    stored: NDArray[np.int64]
    extra: float  # bits per weight besides codewords: raw bits and patches

    @functools.cached_property
    def bound(self) -> float:
        """A lower bound of bits per weight."""
        return self.extra + max(entropy_bits(np.bincount(self.stored, self.shares).tolist()), 1.0) / TRIPLE

    def bits(self, lengths: NDArray[np.int64]) -> float:
        """Bits per weight, given the lengths of the codewords."""
        sizes = np.zeros(HIGH_PARTS**TRIPLE, np.int64)
        sizes[self.held] = lengths
        return self.extra + float((self.shares * sizes[self.stored]).sum()) / TRIPLE


def _tables(split: _Split) -> list[_Table]:
    """Make tables of several sizes for a split."""
    highs = split.highs / split.highs.sum()
    triples = np.einsum("i,j,k->ijk", highs, highs, highs).reshape(-1)
    order = np.argsort(-triples, kind="stable")
    present = int((triples > 0).sum())
    tables = []
    for size in sorted({min(size, present) for size in _TABLE_SIZES}):
        stored = _replacements(order[:size])
        patched = float((triples * _differences(stored)).sum()) / TRIPLE + 1 - float(split.highs.sum())
        tables.append(_Table(split, triples, order[:size], stored, split.raw_bits + patched * PATCH_BITS))
    return tables


def _lengths(shares: NDArray[np.float64]) -> NDArray[np.int64]:
    if len(shares) == 1:
        return np.ones(1, np.int64)
    counts = np.maximum(1, np.rint(shares / shares.sum() * _TOTAL)).astype(np.int64)
    return np.asarray(limited_lengths(counts.tolist(), MAX_LENGTH), np.int64)


def high_parts(triples: NDArray[np.int64]) -> NDArray[np.int64]:
    """The three high parts of each triple: (...) -> (..., 3)."""
    shifts = HIGH_BITS * np.arange(TRIPLE - 1, -1, -1)
    parts: NDArray[np.int64] = triples[..., None] >> shifts & (HIGH_PARTS - 1)
    return parts


def _differences(stored: NDArray[np.int64]) -> NDArray[np.uint8]:
    """Count the high parts in which each triple differs from the one that it is stored as."""
    return _all_differences()[np.arange(len(stored)), stored]


@functools.cache
def _all_differences() -> NDArray[np.uint8]:
    """Count the high parts in which each triple differs from each other triple: (512, 512)."""
    parts = high_parts(np.arange(HIGH_PARTS**TRIPLE))
    differing: NDArray[np.uint8] = (parts[:, None] != parts[None]).sum(2, dtype=np.uint8)
    return differing


def _replacements(held: NDArray[np.int64]) -> NDArray[np.int64]:
    """Find, for each triple, the one in the table that differs in the fewest high parts; of equals, the likeliest."""
    nearest: NDArray[np.int64] = held[np.argmin(_all_differences()[:, held], axis=1)]
    return nearest


def _code(table: _Table, lengths: NDArray[np.int64], bits: float) -> TripleCode:
    """Make the canonical code of these lengths, whose codewords have their first bit lowest."""
    codewords = np.zeros(HIGH_PARTS**TRIPLE, np.uint8)
    sizes = np.zeros(HIGH_PARTS**TRIPLE, np.uint8)
    next_word = 0
    previous = 0
    for i in np.argsort(lengths, kind="stable"):
        length = int(lengths[i])
        next_word <<= length - previous
        codewords[table.held[i]] = int(f"{next_word:0{length}b}"[::-1], 2)
        sizes[table.held[i]] = length
        next_word += 1
        previous = length
    split, stored = table.split, table.stored
    likeliest = int(np.argmax(split.highs))
    return TripleCode(split.raw_bits, split.base, codewords[stored], sizes[stored], stored, likeliest, bits)
