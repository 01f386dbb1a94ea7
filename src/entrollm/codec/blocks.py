"""How a matrix is cut into blocks: about 8192 weights, a few rows of up to 4096 columns."""

from __future__ import annotations

from entrollm._core import MAX_BLOCK, MAX_BLOCK_COLUMNS
from entrollm.format.blocks import Blocks, padded

# A product sums at most this many columns in 32 bits; see kMaxBlockColumns in native/format/geometry.hpp.
_WIDEST = MAX_BLOCK_COLUMNS
# Larger blocks spread the fixed cost of their lists over more weights; their symbols still fit the first-level cache.
_TARGET = MAX_BLOCK
# Dense fields are packed in groups of up to this many weights; blocks of whole groups waste nothing.
_GROUP = 512


def choose_blocks(rows: int, columns: int) -> Blocks:
    """The block sizes for a matrix of `rows` x `columns` weights, both at least 1."""
    width = padded(columns)
    if width > _WIDEST:
        parts = -(-width // _WIDEST)
        width = min(-(-width // parts // _GROUP) * _GROUP, _WIDEST)
    most = max(1, min(rows, _TARGET // width))
    even = [n for n in range(1, most + 1) if n * width % _GROUP == 0 and n * width >= _TARGET // 2]
    return Blocks(even[-1] if even else most, width)
