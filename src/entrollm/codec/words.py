"""Words of lossless matrices: divide them into coded symbols and low bytes, and join these again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from entrollm import _core
from entrollm.codec.blocks import choose_blocks
from entrollm.files.dtypes import DTYPES
from entrollm.format import layout
from entrollm.format.blocks import block_count
from entrollm.format.code import Code
from entrollm.format.flat import AnyCode
from entrollm.format.lossless import GRID_NAME, LosslessKind
from entrollm.format.spec import TensorSpec

# By byte: rotated left by one bit, so that the sign comes last.
_ROTATED = np.array([(byte << 1 | byte >> 7) & 0xFF for byte in range(256)], np.uint8)
_LOWER_HALF = np.uint32(0xFFFF)


def word_type(weights: NDArray[Any]) -> str | None:
    """The type of words that hold weights bit for bit; None if only their own type does.

    Args:
        weights: of any type. F32 is held by BF16 where the lower half of every weight is zero.
    """
    if weights.dtype == np.float32:
        return None if (weights.view(np.uint32) & _LOWER_HALF).any() else "BF16"
    found = {DTYPES[name]: name for name in ("BF16", "F16", "F8_E4M3", "F8_E5M2")}
    return found.get(weights.dtype)


def divide(kind: LosslessKind, weights: NDArray[Any]) -> tuple[NDArray[np.uint8], NDArray[np.uint8] | None]:
    """Divide weights into symbols and low bytes.

    Args:
        kind: the kind of the matrix; its type holds the weights.
        weights: shape (rows, columns), in the type of the words, or in F32.
    Returns:
        uint8 (rows, columns) each; the low bytes are None for words of 8 bits.
    """
    symbols = np.empty(weights.shape, np.uint8)
    low = np.empty(weights.shape, np.uint8) if kind.has_low else None
    divide_into(kind, weights, symbols, low)
    return symbols, low


def divide_into(
    kind: LosslessKind, weights: NDArray[Any], symbols: NDArray[np.uint8], low: NDArray[np.uint8] | None
) -> None:
    """Divide weights as `divide` does, into arrays of their shape whose rows are contiguous."""
    if low is None:
        np.take(_ROTATED, weights.view(np.uint8), out=symbols)
        return
    if weights.dtype == np.float32:
        words = (weights.view(np.uint32) >> np.uint32(16)).astype(np.uint16)
    else:
        words = np.ascontiguousarray(weights).view(np.uint16)
    _core.split_words(words, symbols, low)


def encode_words(
    weights: NDArray[Any], choose: Callable[[Sequence[int], int, int], AnyCode]
) -> tuple[TensorSpec, dict[str, NDArray[Any]]]:
    """Encode a matrix in memory.

    Args:
        weights: shape (rows, columns), at least one weight, of a type that `word_type` knows.
        choose: returns the code for a histogram of symbols, a number of blocks and a number of bits that are not
            coded; not a flat one.
    Returns:
        its spec, without a checksum and parts, and its arrays by suffix.
    """
    kind = LosslessKind(word_type(weights) or "")
    symbols, low = divide(kind, weights)
    rows, columns = weights.shape
    blocks = choose_blocks(rows, columns)
    counts = [int(count) for count in _core.histogram(symbols)]
    code = choose(counts, block_count(rows, columns, blocks), kind.low_bits)
    assert isinstance(code, Code)  # flat codes are chosen for speed alone
    dense, sparse, sizes = _core.encode(code.program(), code.low_bits, symbols, blocks.rows, blocks.columns)
    arrays: dict[str, NDArray[Any]] = {
        layout.DENSE: layout.padded_stream([dense]),
        layout.SPARSE: layout.padded_stream([sparse]),
    }
    if sparse.size:
        arrays[layout.SPARSE_SIZES] = sizes
    if low is not None:
        arrays[layout.LOW] = layout.padded_stream([low.reshape(-1)])
    dtype = next(name for name, stored in DTYPES.items() if stored == weights.dtype)
    spec = TensorSpec(rows, columns, dtype, GRID_NAME, code, blocks, kind)
    return spec, {suffix: array for suffix, array in arrays.items() if array.size}


def weights_of(kind: LosslessKind, dtype: str, words: NDArray[np.uint8]) -> NDArray[Any]:
    """The weights that words hold, in their original type.

    Args:
        kind: the kind of the matrix.
        dtype: the original type, by its safetensors name.
        words: uint8, shape (rows, bytes), as `_core.LosslessMatrix.words` returns them.
    """
    if dtype == "F32":
        return (words.view(np.uint16).astype(np.uint32) << np.uint32(16)).view(np.float32)
    return words.view(ml_dtypes.bfloat16 if kind.type == "BF16" else DTYPES[kind.type])
