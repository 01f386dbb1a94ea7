"""Write symbols as the chunks that the kernels decode; docs/research/cuda.md describes the layout.

All of it is plain torch operations, so that it runs, and is tested, on any device.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from entrollm.errors import UnsupportedError
from entrollm.torch.cuda.layout import (
    FIRST_BIT,
    LANES,
    MAX_SEGMENTS,
    ROW_BYTES,
    SPAN_COLUMNS,
    SPAN_TRIPLES,
    STEP_COLUMNS,
    STREAMS,
    TILE_ROWS,
    UNIT_COLUMNS,
    starts_bytes,
)
from entrollm.torch.cuda.shape import Room, Shape
from entrollm.torch.cuda.triples import HIGH_BITS, HIGH_PARTS, TripleCode, high_parts

BATCH_WEIGHTS = 1 << 23
"""Weights whose temporary tensors are in memory at a time."""

# Raw bits are stored in sets of this many bits per symbol.
_RAW_SETS = (4, 2, 1)
# A segment's start in a lane's stream is the segment's base plus a delta in units of this.
_DELTA_BITS = 2
_LARGEST_DELTA = 255


@dataclass(frozen=True)
class Chunks:
    """The chunks of a matrix as the kernels read them; all tensors are on one device.

    Attributes:
        shape: how the matrix is cut.
        data: uint8, the chunks, each a multiple of 16 bytes.
        table: int32, shape (tiles, chunks, 4): offset / 16, size / 16, where the streams end in bytes, and
            patches + 65536 * rows of words of the first stream.
        largest_bytes: size of the largest chunk.
    """

    shape: Shape
    data: Tensor
    table: Tensor
    largest_bytes: int


SymbolReader = Callable[[int, int], Tensor]


def write_chunks(name: str, shape: Shape, code: TripleCode, rows: Tensor, read: SymbolReader, room: Room) -> Chunks:
    """Write the rows of a matrix as chunks, in the order in which they are read.

    Args:
        name: the matrix's name, for errors.
        shape: how to cut it.
        code: the code of its symbols.
        rows: int32, shape (rows, 3), on the device: the words about each row, from `rows.row_words`.
        read: returns the symbols of rows [begin, end): uint8, shape (end - begin, columns), on the device.
        room: has the largest size of a chunk. If some rows take so many bits that chunks exceed it, the matrix is cut
            finer.
    Raises:
        UnsupportedError: a chunk does not fit in the layout's fields.
    """
    limit, fewest_spans = room.chunk_limit, room.tuning.fewest_shared_spans
    while True:
        writer = _Writer(name, shape, code, rows)
        parts = [writer.measure(symbols) for _, symbols in _batches(shape, code, read)]
        starts = torch.cat([part.starts for part in parts])
        sizes = torch.cat([part.sizes for part in parts])  # (tiles, chunks, 3): rows of two streams, patches
        table, total = writer.chunk_table(sizes)
        largest = int(table[..., 1].max()) * 16
        finer = shape.cut(math.ceil(shape.chunks * largest / limit), fewest_spans) if limit else shape
        if largest <= limit or finer.chunks <= shape.chunks:
            break
        shape = finer
    data = torch.zeros(total, dtype=torch.uint8, device=rows.device)
    for tile, symbols in _batches(shape, code, read):
        end = tile + len(symbols)
        writer.write(tile, symbols, starts[tile:end], sizes[tile:end], table[tile:end], data.view(torch.int32))
    return Chunks(shape, data, table.to(torch.int32), largest)


def _batches(shape: Shape, code: TripleCode, read: SymbolReader) -> Iterator[tuple[int, Tensor]]:
    """Yield batches of tiles: the first tile and its symbols, uint8 (tiles, 16, spans * 72), with padding."""
    # The padding has the likeliest high part, which costs few bits.
    padding = min(max(code.base + (code.likeliest << code.raw_bits), 0), 255)
    step = max(1, BATCH_WEIGHTS // (TILE_ROWS * shape.columns))
    width = shape.spans * SPAN_COLUMNS
    for tile in range(0, shape.tiles, step):
        last = min(shape.tiles, tile + step)
        symbols = read(tile * TILE_ROWS, min(shape.rows, last * TILE_ROWS))
        padded = symbols.new_full(((last - tile) * TILE_ROWS, width), padding)
        padded[: len(symbols), : shape.columns] = symbols
        yield tile, padded.reshape(last - tile, TILE_ROWS, width)


@dataclass(frozen=True)
class _Measured:
    starts: Tensor  # (tiles, chunks, segments, 2, 32), bits from the start of the stream
    sizes: Tensor


class _Writer:
    """Writes a matrix that is cut in one way."""

    def __init__(self, name: str, shape: Shape, code: TripleCode, rows: Tensor) -> None:
        device = rows.device
        self._rows = torch.nn.functional.pad(rows, (0, 0, 0, shape.tiles * TILE_ROWS - len(rows))).long() & 0xFFFFFFFF
        self._name = name
        self._shape = shape
        self._code = code
        self._device = device
        self._lengths = torch.tensor(code.lengths.astype("int32"), device=device)
        self._codewords = torch.tensor(code.codewords.astype("int64"), device=device)
        self._stored = torch.tensor(high_parts(code.stored).astype("uint8"), device=device)
        bounds = torch.tensor(shape.segment_bounds(), device=device)
        self._bounds = bounds * SPAN_TRIPLES
        self._column_chunk = torch.bucketize(
            torch.arange(shape.spans * SPAN_COLUMNS, device=device),
            bounds[shape.segments :: shape.segments] * SPAN_COLUMNS,
            right=True,
        )

    def measure(self, symbols: Tensor) -> _Measured:
        """Find where every segment begins and how much room each chunk needs."""
        shape = self._shape
        tiles = len(symbols)
        triples = self._triples(symbols)
        ends = look_up(self._lengths, triples).cumsum(-1, dtype=torch.int32)
        ends = torch.nn.functional.pad(ends, (1, 0))
        bits = ends[..., self._bounds].long().diff(dim=-1)  # (tiles, 2, 32, chunks * segments)
        bits = bits.reshape(tiles, STREAMS, LANES, shape.chunks, shape.segments).permute(0, 3, 4, 1, 2)
        starts = torch.zeros_like(bits)
        end = bits[:, :, 0]
        for segment in range(1, shape.segments):
            base = self._base(end)
            starts[:, :, segment] = base + -(-(end - base).clamp(min=0) // _DELTA_BITS) * _DELTA_BITS
            end = starts[:, :, segment] + bits[:, :, segment]
        if int(end.max()) >= 1 << 16:
            raise UnsupportedError(f"{self._name}: a chunk takes more than 65535 bits of one lane")
        rows = (end.amax(-1) + FIRST_BIT + 31) // 32
        patches = torch.zeros(tiles, shape.chunks, 1, dtype=torch.int64, device=self._device)
        tile, _, column, _ = self._patches(symbols, triples)
        patches.view(-1).index_add_(0, tile * shape.chunks + self._column_chunk[column], torch.ones_like(tile))
        return _Measured(starts, torch.cat([rows, patches], -1))

    def chunk_table(self, sizes: Tensor) -> tuple[Tensor, int]:
        """The table of chunks, int64, and the size of all chunks in bytes."""
        if int(sizes.max()) >= 1 << 16:
            raise UnsupportedError(f"{self._name}: a chunk has more than 65535 patches or rows of words")
        tail = (sizes[..., 0] + sizes[..., 1]) * LANES * 4
        raw = torch.tensor([self._raw_words(begin, end) * 4 for begin, end in self._shape.chunk_columns()])
        size = tail + starts_bytes(self._shape.segments) + raw.to(self._device) + sizes[..., 2] * 4
        size[:, 0] += TILE_ROWS * ROW_BYTES
        size = -(-size // 16)
        offsets = size.reshape(-1).cumsum(0).reshape(size.shape) - size
        table = torch.stack([offsets, size, tail, sizes[..., 2] + (sizes[..., 0] << 16)], -1)
        total = int(size.sum()) * 16
        if total >= 1 << 33:
            raise UnsupportedError(
                f"{self._name}: the GPU kernels take at most 8 GiB of a matrix, this has {total} bytes"
            )
        return table, total

    def write(self, tile: int, symbols: Tensor, starts: Tensor, sizes: Tensor, chunks: Tensor, words: Tensor) -> None:
        """Write the chunks of some tiles, the first of which is number `tile`, into `words`, which hold all chunks."""
        triples = self._triples(symbols)
        self._write_streams(triples, starts, sizes, chunks, words)
        self._write_starts(starts, chunks, words)
        raw_begin = chunks[..., 0] * 4 + chunks[..., 2] // 4 + starts_bytes(self._shape.segments) // 4
        rows = self._rows[tile * TILE_ROWS : (tile + len(symbols)) * TILE_ROWS].reshape(len(symbols), -1)
        index = raw_begin[:, :1] + torch.arange(rows.shape[1], device=self._device)
        _scatter(words, index.reshape(-1), rows.reshape(-1))
        raw_begin[:, 0] += rows.shape[1]
        for chunk, (begin, end) in enumerate(self._shape.chunk_columns()):
            self._write_raw(symbols[:, :, begin:end], begin % UNIT_COLUMNS, raw_begin[:, chunk], words)
            raw_begin[:, chunk] += self._raw_words(begin, end)
        self._write_patches(symbols, triples, raw_begin, words)

    def _raw_words(self, begin: int, end: int) -> int:
        return (-(-end // UNIT_COLUMNS) - begin // UNIT_COLUMNS) * self._code.raw_bits * LANES

    def _base(self, end: Tensor) -> Tensor:
        """The base of a segment's starts. A lane whose last segment ends before the base leaves a gap."""
        lanes = end.flatten(-2)
        base = torch.maximum(lanes.amin(-1), lanes.amax(-1) - _LARGEST_DELTA * _DELTA_BITS)
        return base[..., None, None]

    def _highs(self, symbols: Tensor) -> Tensor:
        return (symbols.to(torch.int16) - self._code.base) >> self._code.raw_bits

    def _triples(self, symbols: Tensor) -> Tensor:
        """Triples in the order in which lanes decode them: int32 (tiles, 2, 32, spans * 6)."""
        highs = self._highs(symbols).clamp_(0, HIGH_PARTS - 1)
        highs = highs.reshape(len(symbols), STREAMS, 8, -1, 4, 3)  # stream, lane's row, step and half, quarter
        triples = (highs[..., 0] << 2 * HIGH_BITS) + (highs[..., 1] << HIGH_BITS) + highs[..., 2]
        return triples.permute(0, 1, 2, 4, 3).reshape(len(symbols), STREAMS, LANES, -1).to(torch.int32)

    def _patches(self, symbols: Tensor, triples: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Find symbols that do not decode to themselves: tile, row, column, difference, in the order of tiles."""
        stored = look_up(self._stored, triples).reshape(len(symbols), STREAMS, 8, 4, -1, 3)
        decoded = stored.permute(0, 1, 2, 4, 3, 5).reshape(symbols.shape)
        difference = self._highs(symbols).sub_(decoded)
        tile, row, column = difference.nonzero(as_tuple=True)
        return tile, row, column, difference[tile, row, column].long() << self._code.raw_bits

    def _write_streams(self, triples: Tensor, starts: Tensor, sizes: Tensor, chunks: Tensor, words: Tensor) -> None:
        shape = self._shape
        lengths = look_up(self._lengths, triples)
        position = lengths.cumsum(-1, dtype=torch.int32).sub_(lengths)
        segments = self._bounds.diff()
        first = position[..., self._bounds[:-1].clamp(max=position.shape[-1] - 1)]
        placed = starts.permute(0, 3, 4, 1, 2).flatten(-2)  # (tiles, 2, 32, chunks * segments)
        position += torch.repeat_interleave((placed - first + FIRST_BIT).to(torch.int32), segments, -1)
        origin = chunks[..., 0] * 4
        origin = torch.stack([origin, origin + sizes[..., 0] * LANES], 1)  # (tiles, 2, chunks)
        per_chunk = segments.reshape(shape.chunks, -1).sum(1)
        origin = torch.repeat_interleave(origin.to(torch.int32), per_chunk, -1)[:, :, None]
        lane = torch.arange(LANES, dtype=torch.int32, device=self._device)[:, None]
        index = ((position >> 5) * LANES).add_(origin).add_(lane).reshape(-1)
        bits = (look_up(self._codewords, triples) << (position & 31)).reshape(-1)
        _scatter(words, index, bits)
        spills = bits >> 32 != 0
        _scatter(words, index[spills] + LANES, bits[spills] >> 32)

    def _write_starts(self, starts: Tensor, chunks: Tensor, words: Tensor) -> None:
        shape = self._shape
        bases = starts.flatten(-2).amin(-1)
        deltas = (starts - bases[..., None, None]) // _DELTA_BITS
        padded = torch.nn.functional.pad(bases, (0, MAX_SEGMENTS - shape.segments))
        content = torch.cat([_words(padded, 16), _words(deltas.flatten(2), 8)], -1)
        begin = chunks[..., 0] * 4 + chunks[..., 2] // 4
        index = begin[..., None] + torch.arange(content.shape[-1], device=self._device)
        _scatter(words, index.reshape(-1), content.reshape(-1))

    def _write_raw(self, symbols: Tensor, left: int, begin: Tensor, words: Tensor) -> None:
        """Write the raw bits of a chunk's columns; the first is column `left` of its unit."""
        raw_bits = self._code.raw_bits
        units = -(-(left + symbols.shape[-1]) // UNIT_COLUMNS)
        raw = ((symbols.to(torch.int16) - self._code.base) & ((1 << raw_bits) - 1)).to(torch.uint8)
        raw = torch.nn.functional.pad(raw, (left, units * UNIT_COLUMNS - left - raw.shape[-1]))
        # tile, half of the rows, lane's row, unit, step, half, quarter, byte -> tile, lane, unit, register, byte
        raw = raw.reshape(len(raw), 2, 8, units, 2, 2, 4, 4).permute(0, 2, 6, 3, 4, 5, 1, 7)
        raw = raw.reshape(len(raw), LANES, units, 8, 4)
        for bits in _RAW_SETS:
            if not raw_bits & bits:
                continue
            values = (raw >> (raw_bits & (bits - 1))) & ((1 << bits) - 1)
            values = values.reshape(len(raw), LANES, units, bits, 8 // bits, 4).to(torch.int32)
            turn = torch.arange(1, 8 // bits + 1, dtype=torch.int32, device=self._device)[:, None]
            shifts = 8 * torch.arange(4, dtype=torch.int32, device=self._device) + 8 - bits * turn
            # The values of a word fill all 32 bits, so that the sum may be negative.
            content = (values << shifts).sum((-1, -2), dtype=torch.int32).permute(0, 2, 3, 1).reshape(len(raw), -1)
            index = begin[:, None] + torch.arange(content.shape[-1], device=self._device)
            _scatter(words, index.reshape(-1), content.reshape(-1))
            begin = begin + content.shape[-1]

    def _write_patches(self, symbols: Tensor, triples: Tensor, begin: Tensor, words: Tensor) -> None:
        tile, row, column, difference = self._patches(symbols, triples)
        if len(difference) and not -256 <= int(difference.min()) <= int(difference.max()) < 256:
            raise UnsupportedError(f"{self._name}: its symbols are too far apart for the GPU layout")
        chunk = tile * self._shape.chunks + self._column_chunk[column]
        order = torch.argsort(chunk * len(self._column_chunk) + column)  # keeps a segment's patches together
        tile, row, column, difference, chunk = (x[order] for x in (tile, row, column, difference, chunk))
        counts = torch.bincount(chunk, minlength=begin.numel())
        inside = torch.arange(len(chunk), device=self._device) - (counts.cumsum(0) - counts)[chunk]
        step, rest = column // STEP_COLUMNS, column % STEP_COLUMNS
        digit = step * 32 + rest % 12 // 3 * 8 + rest // 12 * 4 + rest % 3 + 1
        _scatter(words, begin.reshape(-1)[chunk] + inside, row + (difference + 256 << 4) + (digit << 13))


def _words(values: Tensor, width: int) -> Tensor:
    """Join values of `width` bits along the last axis into words, the first in the lowest bits."""
    per_word = 32 // width
    grouped = values.reshape(*values.shape[:-1], -1, per_word)
    return (grouped << width * torch.arange(per_word, device=values.device)).sum(-1)


def look_up(table: Tensor, indices: Tensor) -> Tensor:
    """Look up rows of a table without copying indices to 64 bits: (*indices.shape, *table.shape[1:])."""
    return table.index_select(0, indices.reshape(-1)).reshape(*indices.shape, *table.shape[1:])


def _scatter(words: Tensor, index: Tensor, bits: Tensor) -> None:
    """Add the low 32 bits of values to words; values with the same index must have no bit in common."""
    words.index_add_(0, index, bits.to(torch.int32))
