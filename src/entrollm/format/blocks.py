"""How the weights of a matrix are cut into blocks."""

from __future__ import annotations

from dataclasses import dataclass

from entrollm._core import VECTOR


@dataclass(frozen=True, slots=True)
class Blocks:
    """A block holds up to `columns` columns (a multiple of 64) of `rows` rows."""

    rows: int
    columns: int


def padded(columns: int) -> int:
    """Columns rounded up to whole vectors of 64."""
    return -(-columns // VECTOR) * VECTOR


def block_count(rows: int, columns: int, blocks: Blocks) -> int:
    """Number of blocks of a matrix."""
    return -(-rows // blocks.rows) * -(-padded(columns) // blocks.columns)
