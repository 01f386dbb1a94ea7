"""Flat codes: fields of one width for each segment of rows, and patches for the symbols outside."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeAlias

from entrollm.errors import FormatError
from entrollm.format.blocks import Blocks, padded
from entrollm.format.code import Code
from entrollm.format.json_fields import is_int

MIN_FLAT_BITS, MAX_FLAT_BITS = 2, 8
MAX_SEGMENT_ROWS = 8192
LEAST_PATCH, MOST_PATCH = -8, 7
"""The differences that one patch can state."""
MOST_GAP = 4095
"""The columns that one patch can pass over."""
PATCH_BITS = 16
_KEY = "flat"


@dataclass(frozen=True, slots=True)
class FlatCode:
    """A code without a tree: a symbol is its segment's base plus a field, and patches correct those outside.

    Attributes:
        segment_rows: rows of a segment, whose width and base the matrix stores.
    """

    segment_rows: int

    def segments(self, rows: int) -> int:
        """The number of segments of a matrix."""
        return -(-rows // self.segment_rows)

    def blocks(self, columns: int) -> Blocks:
        """A segment as a block, so that readers of whole blocks read whole segments."""
        return Blocks(self.segment_rows, padded(columns))

    def to_json(self) -> dict[str, int]:
        """The JSON form."""
        return {_KEY: self.segment_rows}


AnyCode: TypeAlias = Code | FlatCode
"""How the symbols of a matrix are stored."""


def flat_from_json(value: Any, name: str) -> FlatCode | None:
    """Parse the JSON form of a code; None if it is not that of a flat code.

    Raises:
        FormatError: it is a malformed flat code; the message begins with `name`.
    """
    if not isinstance(value, dict) or _KEY not in value:
        return None
    if len(value) != 1 or not is_int(value[_KEY], 1, MAX_SEGMENT_ROWS):
        raise FormatError(f"{name}: a flat code needs 1 to {MAX_SEGMENT_ROWS} rows in a segment, found {value!r:.80}")
    return FlatCode(value[_KEY])
