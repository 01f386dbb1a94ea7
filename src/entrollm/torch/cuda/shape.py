"""How a matrix is cut for the GPU: tiles, chunks, and segments; docs/research/cuda.md describes them."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace

from entrollm.errors import UnsupportedError

TILE_ROWS = 16
GROUP_COLUMNS = 72
STEP_COLUMNS = 24
UNIT_COLUMNS = 64
LANES = 32
STREAMS = 2
MAX_SEGMENTS = 8
# Segments of a chunk that a warp decodes together.
TOGETHER = 2

_MAX_COLUMNS = 1 << 16
_MAX_BOUNDS = 256
# A GPU that matrices are cut for: blocks, and warps of each, which take a pair of segments at a time.
_BLOCKS = 132
_WARPS = 24
# With larger chunks, too few fit a block's shared memory at a time; each has starts, and lanes that end early.
_CHUNK_BYTES = 43 << 9
# Of a tile, where each block of half a multiprocessor has one.
_HALF_ROOM_BYTES = 40 << 10
# What starting and ending a pair of segments costs, in pairs of groups, and what a turn of warps costs whose chunks are
# asked for when the turn before has ended; and what a chunk more than needed costs, of the whole: fitted to measured
# times.
_START_GROUPS = 3.0
_WAIT_GROUPS = 6.0
_CHUNK_COST = 0.03
# Of a segment, where warps have too little to do; the second is for half a multiprocessor.
_FEWEST_GROUPS = 3
_HALF_FEWEST_GROUPS = 2


@dataclass(frozen=True)
class Shape:
    """How a matrix is cut.

    Attributes:
        rows, columns: of the matrix.
        chunks: ranges of columns of a tile.
        segments: ranges of columns of a chunk.
    """

    rows: int
    columns: int
    chunks: int
    segments: int

    @property
    def tiles(self) -> int:
        """Sixteen rows each; the last may have fewer."""
        return -(-self.rows // TILE_ROWS)

    @property
    def groups(self) -> int:
        """72 columns each."""
        return -(-self.columns // GROUP_COLUMNS)

    def cut(self, chunks: int) -> Shape:
        """The same matrix cut into so many chunks, or as many as there may be."""
        chunks = min(chunks, self.groups // TOGETHER, _MAX_BOUNDS // self.segments)
        most_pairs = max(1, self.groups // max(1, chunks) // (TOGETHER * _HALF_FEWEST_GROUPS))
        return replace(self, chunks=chunks, segments=min(self.segments, most_pairs * TOGETHER))

    def group_bounds(self) -> list[int]:
        """Where every segment of every chunk begins, in groups, and where the last ends."""
        bounds = [0]
        for begin, end in self.chunk_groups():
            bounds += [begin + (end - begin) * (i + 1) // self.segments for i in range(self.segments)]
        return bounds

    def chunk_groups(self) -> list[tuple[int, int]]:
        """The range of groups of each chunk."""
        edges = [self.groups * i // self.chunks for i in range(self.chunks + 1)]
        return list(itertools.pairwise(edges))

    def chunk_columns(self) -> list[tuple[int, int]]:
        """The range of columns of each chunk."""
        return [(begin * GROUP_COLUMNS, min(self.columns, end * GROUP_COLUMNS)) for begin, end in self.chunk_groups()]


def starts_bytes(segments: int) -> int:
    """What a chunk says of where its segments begin."""
    return 2 * MAX_SEGMENTS + segments * STREAMS * LANES


def choose_shape(
    name: str,
    rows: int,
    columns: int,
    bits: float,
    chunk_limit: int = 0,
    slots: Callable[[int], int] = lambda _: _WARPS,
) -> Shape:
    """Cut a matrix so that segments keep warps busy and chunks fit the shared memory.

    Args:
        bits: of a weight.
        chunk_limit: bytes that chunks should not exceed, or 0.
        slots: how many chunks of so many bytes a multiprocessor holds.
    Raises:
        UnsupportedError: rows are longer than exact sums allow.
    """
    if columns >= _MAX_COLUMNS:
        raise UnsupportedError(f"{name}: the GPU kernels take at most {_MAX_COLUMNS - 1} columns, this has {columns}")
    groups = -(-columns // GROUP_COLUMNS)
    tile_bytes = TILE_ROWS * columns * bits / 8
    most_pairs = MAX_SEGMENTS // TOGETHER
    # Some chunks are larger than others, and all have more in them than codewords.
    chunk_bytes = min(_CHUNK_BYTES, chunk_limit * 15 // 16) if chunk_limit else _CHUNK_BYTES
    chunks = max(1, math.ceil(tile_bytes / chunk_bytes))
    most_chunks, fewest_turns = chunks, 1

    def held(count: int) -> int:
        return slots(int(tile_bytes / count * 1.1) + starts_bytes(MAX_SEGMENTS))

    if rows <= 2 * TILE_ROWS * _BLOCKS and tile_bytes <= _HALF_ROOM_BYTES:
        # Two blocks share a multiprocessor; each has one tile.
        tiles, warps, fewest_groups = 1, _WARPS // 2, _HALF_FEWEST_GROUPS
        chunks = max(chunks, min(warps // most_pairs, round(groups / (MAX_SEGMENTS * _FEWEST_GROUPS))))
    else:
        tiles, warps, fewest_groups = -(-rows // (TILE_ROWS * _BLOCKS)), _WARPS, _FEWEST_GROUPS
        chunks = max(chunks, min(-(-most_pairs // tiles), groups // (MAX_SEGMENTS * _FEWEST_GROUPS)))
        if tiles * chunks > held(chunks):
            # Chunks must wait for room, so one turn of the warps is too few.
            most_chunks, fewest_turns = 2 * chunks, 2
    if chunks * TOGETHER > _MAX_BOUNDS:
        raise UnsupportedError(f"{name}: its rows of {columns} weights are too long for the GPU kernels")

    def cost(cut: tuple[int, int]) -> tuple[float, int]:
        # Warps wait for the last of their block, so the last turn should be a full one.
        shares, room = tiles * cut[0] * cut[1], held(cut[0]) * cut[1]
        turns = max(fewest_turns, -(-shares // min(warps, room)))
        turn = groups / (cut[0] * cut[1] * TOGETHER) + _START_GROUPS
        # All warps of one or two tiles end a turn at the same time; later they are spread.
        late = _WAIT_GROUPS * min(1.0, 2 - room / warps) if tiles <= 2 and shares > room else 0.0
        return (turns * turn + late) * (1 + _CHUNK_COST * (cut[0] - chunks)), cut[0]

    def pairs(count: int) -> range:
        most = min(most_pairs, _MAX_BOUNDS // count // TOGETHER, groups // count // (TOGETHER * fewest_groups))
        return range(1, max(1, most) + 1)

    counts = range(chunks, max(chunks, min(most_chunks, groups // TOGETHER, _MAX_BOUNDS // TOGETHER)) + 1)
    best = min(((count, pair) for count in counts for pair in pairs(count)), key=cost)
    return Shape(rows, columns, best[0], best[1] * TOGETHER)
