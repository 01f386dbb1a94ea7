"""How a matrix is cut into blocks: about 4096 weights, whole rows where rows are short."""

from __future__ import annotations

from entrollm._core import VECTOR
from entrollm.specs import Blocks

_TARGET = 4096
_LARGEST = 4608
# Dense fields are packed in groups of up to this many weights; blocks of whole groups waste nothing.
_GROUP = 512


def padded(columns: int) -> int:
    """Columns rounded up to whole vectors of 64."""
    return -(-columns // VECTOR) * VECTOR


def choose_blocks(rows: int, columns: int) -> Blocks:
    """The block sizes for a matrix of `rows` x `columns` weights, both at least 1."""
    width = padded(columns)
    if width > _TARGET:
        parts = -(-width // _TARGET)
        return Blocks(1, min(-(-width // parts // _GROUP) * _GROUP, _TARGET))
    most = max(1, min(rows, _LARGEST // width))
    even = [n for n in range(1, most + 1) if n * width % _GROUP == 0 and n * width >= _LARGEST // 2]
    return Blocks(even[-1] if even else most, width)


def block_count(rows: int, columns: int, blocks: Blocks) -> int:
    """Number of blocks of a matrix."""
    return -(-rows // blocks.rows) * -(-padded(columns) // blocks.columns)
