"""Encode a matrix of symbols, runs of rows side by side."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from numpy.typing import NDArray

from entrollm import _core
from entrollm.codec.flat import encode_flat
from entrollm.format import layout
from entrollm.format.blocks import Blocks
from entrollm.format.flat import AnyCode, FlatCode

# Enough weights to be worth waking a thread, few enough to keep temporaries small.
_CHUNK_WEIGHTS = 1 << 18


def row_chunks(rows: int, columns: int, blocks: Blocks) -> tuple[tuple[int, int], ...]:
    """Ranges of rows that cover a matrix; each is made of whole row blocks and is enough work for a thread."""
    step = max(1, _CHUNK_WEIGHTS // (blocks.rows * columns)) * blocks.rows
    return tuple((begin, min(rows, begin + step)) for begin in range(0, rows, step))


def encode_symbols(
    symbols: NDArray[np.uint8],
    code: AnyCode,
    blocks: Blocks,
    chunks: Sequence[tuple[int, int]],
    executor: ThreadPoolExecutor,
    progress: Callable[[int], None],
) -> dict[str, NDArray[Any]]:
    """Encode a matrix of symbols.

    Args:
        symbols: uint8, shape (rows, columns), all in the code.
        code, blocks: how they are stored; a flat code has no blocks.
        chunks: ranges of rows from `row_chunks`.
        executor: encodes chunks side by side.
        progress: called from its threads with the weights of each chunk that is finished.
    Returns:
        the streams by suffix, with their padding; the sparse stream may be empty, and then there are no sizes.
    """
    if isinstance(code, FlatCode):
        return encode_flat(symbols, code, executor, progress)
    program = code.program()

    def encode(chunk: tuple[int, int]) -> tuple[NDArray[np.uint8], NDArray[np.uint8], NDArray[np.uint16]]:
        rows = symbols[chunk[0] : chunk[1]]
        encoded = _core.encode(program, code.low_bits, rows, blocks.rows, blocks.columns)
        progress(rows.size)
        return encoded

    encoded = list(executor.map(encode, chunks))
    sparse = layout.padded_stream([sparse for _, sparse, _ in encoded])
    arrays: dict[str, NDArray[Any]] = {
        layout.DENSE: layout.padded_stream([dense for dense, _, _ in encoded]),
        layout.SPARSE: sparse,
    }
    if sparse.size:
        arrays[layout.SPARSE_SIZES] = np.concatenate([sizes for _, _, sizes in encoded])
    return arrays
