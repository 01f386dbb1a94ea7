"""What flat codes cost, and encoding with them; see docs/reference/format.md."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from entrollm import _core
from entrollm.format import layout
from entrollm.format.flat import LEAST_PATCH, MAX_FLAT_BITS, MIN_FLAT_BITS, MOST_PATCH, PATCH_BITS, FlatCode

SEGMENT_ROWS = 64
_CHUNK_WEIGHTS = 1 << 18
_GROUPS = 8
_ANY_WINDOWS = np.zeros(0, np.uint16)


@dataclass(frozen=True, slots=True)
class Window:
    """Fields of a segment: their width, and the symbol of field 0."""

    bits: int
    base: int

    def lengths(self) -> NDArray[np.float64]:
        """The bits that each symbol takes, patches included: float64, shape (256,)."""
        symbols = np.arange(256)
        below = -(-np.maximum(0, self.base - symbols) // -LEAST_PATCH)
        above = -(-np.maximum(0, symbols - self.base - 2**self.bits + 1) // MOST_PATCH)
        lengths: NDArray[np.float64] = self.bits + PATCH_BITS * (below + above).astype(np.float64)
        return lengths


def best_window(counts: Sequence[int] | NDArray[np.float64]) -> tuple[Window, float]:
    """The window that takes the fewest bits, and these bits.

    Args:
        counts: 256 entries, how often each symbol occurs.
    """
    found = np.asarray(counts, np.float64)
    before = np.concatenate(([0.0], np.cumsum(found)))
    choices = []
    for bits in range(MIN_FLAT_BITS, MAX_FLAT_BITS + 1):
        window = Window(bits, int(np.argmax(before[2**bits :] - before[: -(2**bits)])))
        choices.append((float(found @ window.lengths()), bits, window))
    cost, _, window = min(choices)
    return window, cost


def sampled_bits(symbols: NDArray[np.uint8]) -> float:
    """Predict the bits per weight of a matrix from a sample of its rows.

    Args:
        symbols: uint8, shape (rows, columns), evenly spaced rows. Neighbours are taken for a segment.
    """
    groups = np.array_split(symbols, min(_GROUPS, len(symbols)))
    bits = sum(best_window([int(c) for c in _core.histogram(group)])[1] for group in groups)
    return bits / symbols.size


def encode_flat(
    symbols: NDArray[np.uint8], code: FlatCode, executor: ThreadPoolExecutor, progress: Callable[[int], None]
) -> dict[str, NDArray[Any]]:
    """Encode a matrix of symbols with the smallest window for each segment.

    Args:
        symbols: uint8, shape (rows, columns).
        code: how they are stored.
        executor: encodes runs of segments side by side.
        progress: called from its threads with the weights of each run that is finished.
    Returns:
        the arrays by suffix, streams with their padding; without patches there are no sizes of patches.
    """

    def encode(begin: int) -> tuple[NDArray[Any], ...]:
        rows = symbols[begin : begin + step]
        encoded = _core.encode_flat(rows, code.segment_rows, _ANY_WINDOWS)
        progress(rows.size)
        return encoded

    step = max(1, _CHUNK_WEIGHTS // (code.segment_rows * symbols.shape[1])) * code.segment_rows
    fields, patches, sizes, windows = zip(*executor.map(encode, range(0, len(symbols), step)), strict=True)
    sparse = layout.padded_stream([part.view(np.uint8) for part in patches])
    arrays: dict[str, NDArray[Any]] = {
        layout.DENSE: layout.padded_stream(fields),
        layout.SPARSE: sparse,
        layout.SEGMENTS: np.concatenate(windows),
    }
    if sparse.size:
        arrays[layout.SPARSE_SIZES] = np.concatenate(sizes)
    return arrays
