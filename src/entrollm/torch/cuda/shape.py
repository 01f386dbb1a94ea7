"""How a matrix is cut for the GPU: tiles, chunks, and segments; docs/research/cuda.md describes them."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace

from entrollm.errors import UnsupportedError
from entrollm.torch.cuda.layout import (
    MAX_BOUNDS,
    MAX_COLUMNS,
    MAX_SEGMENTS,
    SPAN_COLUMNS,
    TILE_ROWS,
    TOGETHER,
    starts_bytes,
)
from entrollm.torch.cuda.tuning import Tuning

_MAX_PAIRS = MAX_SEGMENTS // TOGETHER


@dataclass(frozen=True)
class Shape:
    """How a matrix is cut.

    Attributes:
        rows, columns: of the matrix.
        chunks: ranges of columns that a tile is cut into.
        segments: ranges of columns that a chunk is cut into.
    """

    rows: int
    columns: int
    chunks: int
    segments: int

    @property
    def tiles(self) -> int:
        """Tiles of sixteen rows; the last may have fewer."""
        return -(-self.rows // TILE_ROWS)

    @property
    def spans(self) -> int:
        """Spans of 72 columns; the last may have fewer."""
        return -(-self.columns // SPAN_COLUMNS)

    def cut(self, chunks: int, fewest_spans: int) -> Shape:
        """The same matrix cut into `chunks` chunks, or as many as there may be.

        Args:
            chunks: of a tile.
            fewest_spans: spans of a segment at least.
        """
        chunks = min(chunks, self.spans // TOGETHER, MAX_BOUNDS // self.segments)
        most_pairs = max(1, self.spans // max(1, chunks) // (TOGETHER * fewest_spans))
        return replace(self, chunks=chunks, segments=min(self.segments, most_pairs * TOGETHER))

    def segment_bounds(self) -> list[int]:
        """Where every segment of every chunk begins, in spans, and where the last ends."""
        bounds = [0]
        for begin, end in self.chunk_spans():
            bounds += [begin + (end - begin) * (i + 1) // self.segments for i in range(self.segments)]
        return bounds

    def chunk_spans(self) -> list[tuple[int, int]]:
        """The range of spans of each chunk."""
        edges = [self.spans * i // self.chunks for i in range(self.chunks + 1)]
        return list(itertools.pairwise(edges))

    def chunk_columns(self) -> list[tuple[int, int]]:
        """The range of columns of each chunk."""
        return [(begin * SPAN_COLUMNS, min(self.columns, end * SPAN_COLUMNS)) for begin, end in self.chunk_spans()]


@dataclass(frozen=True)
class Room:
    """What a multiprocessor has room for.

    Attributes:
        tuning: the table of the GPU's family.
        chunk_limit: bytes that chunks should not exceed, or 0 for no limit.
        slots: how many chunks of a given size, in bytes, it holds at a time; `None` if as many as warps.
    """

    tuning: Tuning
    chunk_limit: int = 0
    slots: Callable[[int], int] | None = None

    def chunks_held(self, tile_bytes: float, chunks: int) -> int:
        """How many chunks it holds at a time where a tile of `tile_bytes` is cut into `chunks` chunks; at least 1.

        If it has no room for any, no product runs: the matrix is always decoded to memory, and any cut will do.
        """
        if self.slots is None:
            return self.tuning.warps
        # Some chunks are larger than others, and all have starts of segments besides codewords.
        return max(1, self.slots(int(tile_bytes / chunks * 1.1) + starts_bytes(MAX_SEGMENTS)))


@dataclass(frozen=True)
class _Work:
    """What a block has to do, and how finely it may be cut.

    Attributes:
        spans: of a row.
        tile_bytes: bytes of a tile.
        tiles: tiles of a block.
        warps: warps of a block.
        fewest_spans: spans of a segment at least.
        fewest_chunks, most_chunks: chunks of a tile.
        fewest_turns: turns that the warps take at least.
    """

    spans: int
    tile_bytes: float
    tiles: int
    warps: int
    fewest_spans: int
    fewest_chunks: int
    most_chunks: int
    fewest_turns: int

    def cuts(self) -> list[tuple[int, int]]:
        """All ways to cut a tile: chunks, and pairs of segments of each."""
        most_chunks = min(self.most_chunks, self.spans // TOGETHER, MAX_BOUNDS // TOGETHER)
        counts = range(self.fewest_chunks, max(self.fewest_chunks, most_chunks) + 1)
        return [(chunks, pairs) for chunks in counts for pairs in range(1, self._most_pairs(chunks) + 1)]

    def _most_pairs(self, chunks: int) -> int:
        long_enough = self.spans // chunks // (TOGETHER * self.fewest_spans)
        return max(1, min(_MAX_PAIRS, MAX_BOUNDS // chunks // TOGETHER, long_enough))

    def cost(self, chunks: int, pairs: int, room: Room) -> float:
        """The time that a cut takes, in pairs of spans that a warp decodes."""
        tuning = room.tuning
        # Warps wait for the last of their block, so the last turn should be a full one.
        shares, held = self.tiles * chunks * pairs, room.chunks_held(self.tile_bytes, chunks) * pairs
        turns = max(self.fewest_turns, -(-shares // min(self.warps, held)))
        turn = self.spans / (chunks * pairs * TOGETHER) + tuning.start_spans
        # All warps of one or two tiles end a turn at the same time; with more tiles, their ends spread.
        waits = self.tiles <= 2 and shares > held
        late = tuning.wait_spans * min(1.0, 2 - held / self.warps) if waits else 0.0
        return (turns * turn + late) * (1 + tuning.chunk_cost * (chunks - self.fewest_chunks))


def choose_shape(name: str, rows: int, columns: int, bits: float, room: Room) -> Shape:
    """Cut a matrix so that segments keep warps busy and chunks fit in shared memory.

    Args:
        name: the matrix's name, for errors.
        rows, columns: its shape.
        bits: bits per weight.
        room: what a multiprocessor has room for.
    Raises:
        UnsupportedError: rows are longer than exact sums allow.
    """
    if columns > MAX_COLUMNS:
        raise UnsupportedError(f"{name}: the GPU kernels take at most {MAX_COLUMNS} columns, this has {columns}")
    work = _work(rows, columns, bits, room)
    if work.fewest_chunks * TOGETHER > MAX_BOUNDS:
        raise UnsupportedError(f"{name}: its rows of {columns} weights are too long for the GPU kernels")
    chunks, pairs = min(work.cuts(), key=lambda cut: (work.cost(cut[0], cut[1], room), cut[0]))
    return Shape(rows, columns, chunks, pairs * TOGETHER)


def _work(rows: int, columns: int, bits: float, room: Room) -> _Work:
    tuning = room.tuning
    spans = -(-columns // SPAN_COLUMNS)
    tile_bytes = TILE_ROWS * columns * bits / 8
    # Some chunks are larger than others, and all have more in them than codewords.
    chunk_bytes = min(tuning.chunk_bytes, room.chunk_limit * 15 // 16) if room.chunk_limit else tuning.chunk_bytes
    chunks = max(1, math.ceil(tile_bytes / chunk_bytes))
    # Chunks whose segments are long enough for all warps.
    long_enough = spans / (MAX_SEGMENTS * tuning.fewest_spans)
    if rows <= 2 * TILE_ROWS * tuning.multiprocessors and tile_bytes <= tuning.tile_bytes:
        # Two blocks share a multiprocessor; each has one tile.
        warps = tuning.warps // 2
        most_chunks = chunks
        chunks = max(chunks, min(warps // _MAX_PAIRS, round(long_enough)))
        return _Work(spans, tile_bytes, 1, warps, tuning.fewest_shared_spans, chunks, most_chunks, 1)
    tiles = -(-rows // (TILE_ROWS * tuning.multiprocessors))
    most_chunks, fewest_turns = chunks, 1
    chunks = max(chunks, min(-(-_MAX_PAIRS // tiles), int(long_enough)))
    if tiles * chunks > room.chunks_held(tile_bytes, chunks):
        # Chunks must wait for room, so one turn of the warps is too few.
        most_chunks, fewest_turns = 2 * chunks, 2
    return _Work(spans, tile_bytes, tiles, tuning.warps, tuning.fewest_spans, chunks, most_chunks, fewest_turns)
