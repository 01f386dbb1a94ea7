"""Choose the blocks of a matrix: about 8192 weights each, a few rows of up to 4096 columns."""

from __future__ import annotations

from entrollm._core import MAX_BLOCK, MAX_BLOCK_COLUMNS
from entrollm.format.blocks import Blocks, padded
from entrollm.format.flat import AnyCode, FlatCode

# A product sums at most this many columns in 32 bits; see kMaxBlockColumns in native/format/geometry.hpp.
_WIDEST = MAX_BLOCK_COLUMNS
# Larger blocks spread the fixed cost of their lists over more weights; their symbols still fit the first-level cache.
_TARGET = MAX_BLOCK
# The dense layout fills whole bytes with runs of up to this many fields; blocks of whole runs waste nothing.
_RUN = 512


def blocks_for(code: AnyCode, rows: int, columns: int) -> Blocks:
    """The blocks that a matrix has with a code: segments with a flat one."""
    return code.blocks(columns) if isinstance(code, FlatCode) else choose_blocks(rows, columns)


def choose_blocks(rows: int, columns: int) -> Blocks:
    """The block sizes for a matrix of `rows` x `columns` weights, both at least 1."""
    width = padded(columns)
    if width > _WIDEST:
        parts = -(-width // _WIDEST)
        width = min(-(-width // parts // _RUN) * _RUN, _WIDEST)
    most = max(1, min(rows, _TARGET // width))
    even = [n for n in range(1, most + 1) if n * width % _RUN == 0 and n * width >= _TARGET // 2]
    return Blocks(even[-1] if even else most, width)
