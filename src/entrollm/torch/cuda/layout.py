"""Sizes of the GPU's layout, which kernels/common.cuh has too; docs/research/cuda.md describes the layout."""

from __future__ import annotations

TILE_ROWS = 16
STEP_COLUMNS = 24
SPAN_COLUMNS = 72
UNIT_COLUMNS = 64
LANES = 32
STREAMS = 2
SPAN_TRIPLES = 6
"""Triples of a span in one stream of a lane."""
FIRST_BIT = 7
"""Where the first codeword begins in a stream."""

MAX_SEGMENTS = 8
"""Segments of a chunk at most: so many starts have room in it."""
TOGETHER = 2
"""Segments of a chunk that a warp decodes together."""
MAX_BOUNDS = 256
"""Segments of a tile at most: so many bounds have room in shared memory."""
MAX_COLUMNS = (1 << 16) - 1
"""Columns of a matrix at most: sums of more products could exceed 32 bits."""

TABLE_BYTES = 4 * 256
"""One copy of the code's table."""
STEP_BYTES = 64
"""The digits of one vector for one step."""
ROW_BYTES = 12
"""The index, scale and offset of a row in a chunk."""


def starts_bytes(segments: int) -> int:
    """Bytes of a chunk that say where its segments begin."""
    return 2 * MAX_SEGMENTS + segments * STREAMS * LANES


def padded_columns(columns: int) -> int:
    """Columns of the vectors that kernels read, four at a time."""
    return -(-columns // 4) * 4
