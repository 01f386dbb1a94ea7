"""The blocks that the weights of a matrix are cut into."""

from __future__ import annotations

from dataclasses import dataclass

from entrollm._core import VECTOR


@dataclass(frozen=True, slots=True)
class Blocks:
    """The size of a block: `rows` rows of `columns` columns, a multiple of 64. Blocks at the edges are smaller."""

    rows: int
    columns: int


def padded(columns: int) -> int:
    """`columns` rounded up to a multiple of 64."""
    return -(-columns // VECTOR) * VECTOR


def block_count(rows: int, columns: int, blocks: Blocks) -> int:
    """The number of blocks of a matrix."""
    return -(-rows // blocks.rows) * -(-padded(columns) // blocks.columns)
