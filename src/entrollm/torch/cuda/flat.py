"""Flat matrices in GPU memory: fields of one width for each tile, and patches for the symbols outside.

They take more memory than coded matrices, but no time for decoding. All of this module is plain torch operations, so
that it runs, and is tested, on any device; kernels/flat.cuh describes the layout too.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from entrollm.errors import UnsupportedError
from entrollm.torch.cuda.chunks import BATCH_WEIGHTS
from entrollm.torch.cuda.layout import LANES, MAX_COLUMNS, TILE_ROWS
from entrollm.torch.cuda.rows import padded_scales, positions_of, row_words

STRIPE_COLUMNS = 256
STRIPE_STEPS = 8
HEAD_WORDS = TILE_ROWS * 3 + 4
MOST_BITS = 8
# What a patch costs, in bits, where widths are chosen: its 32 bits, and its time.
_PATCH_COST = 48
_SETS = (4, 2, 1)


@dataclass(frozen=True)
class FlatPart:
    """One matrix in fields of fixed width. Rows are sorted by the width that suits them.

    Attributes:
        name: the matrix's name, for errors.
        rows, columns: its shape.
        data: uint8, the fields of all tiles.
        heads: int32, shape (tiles, 52): index, scale and offset of every row, the base, and the range of patches.
        patches: int32, sorted by tile and column.
        tile_ends: where the tiles with fields of 1, 2, ..., 8 bits end.
        positions: int32, shape (rows,), the position of each row after sorting.
        column_scale: float32, padded to a multiple of four, or `None` if absent.
    """

    name: str
    rows: int
    columns: int
    data: Tensor
    heads: Tensor
    patches: Tensor
    tile_ends: tuple[int, ...]
    positions: Tensor
    column_scale: Tensor | None

    @property
    def tiles(self) -> int:
        """Tiles of sixteen rows; the last may have fewer."""
        return len(self.heads)

    @property
    def stripes(self) -> int:
        """Stripes of a tile; the last may have fewer columns."""
        return stripes_of(self.columns)

    @property
    def widths(self) -> tuple[int, int]:
        """The narrowest and the widest field, in bits."""
        used = [bits for bits, (begin, end) in enumerate(itertools.pairwise((0, *self.tile_ends)), 1) if begin < end]
        return used[0], used[-1]

    @property
    def size_bytes(self) -> int:
        """GPU memory in use."""
        tensors = [self.data, self.heads, self.patches, self.positions]
        tensors += [] if self.column_scale is None else [self.column_scale]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def stripes_of(columns: int) -> int:
    """Stripes of a row."""
    return -(-columns // STRIPE_COLUMNS)


@dataclass(frozen=True)
class Widths:
    """The fields that suit a matrix.

    Attributes:
        order: int64, shape (rows,), rows sorted by width.
        bits, base: int64, shape (tiles,), of each tile's fields; bits do not fall from one tile to the next.
        total_bits: what fields and patches take.
    """

    order: Tensor
    bits: Tensor
    base: Tensor
    total_bits: int


def choose_widths(symbols: Tensor) -> Widths:
    """Choose the width and the base of every tile's fields: symbols are uint8, shape (rows, columns)."""
    columns = symbols.shape[1]
    step = max(1, BATCH_WEIGHTS // (TILE_ROWS * columns)) * TILE_ROWS
    keys = [_best_fields(_counts(part)) for part in torch.split(symbols, step)]
    order = torch.argsort(torch.cat([width * 256 + base for width, base in keys]), stable=True)
    counts = torch.cat([tile_counts(symbols[part]) for part in torch.split(order, step)])
    width, _ = _best_fields(counts)
    # Tiles of one width lie together. The last may have fewer rows, and therefore stays last.
    width = torch.cummax(width, 0).values
    base, outside = fullest_windows(counts, width)
    padded = stripes_of(columns) * STRIPE_COLUMNS
    return Widths(order, width, base, int((width * padded * TILE_ROWS + outside * 32).sum()))


def _counts(symbols: Tensor) -> Tensor:
    """How often each symbol occurs in each row: int64 (rows, 256)."""
    rows = len(symbols)
    first = torch.arange(rows, device=symbols.device)[:, None] * 256
    return torch.bincount((first + symbols).reshape(-1), minlength=rows * 256).reshape(rows, 256)


def tile_counts(symbols: Tensor) -> Tensor:
    """Count each symbol in each tile of uint8 symbols, shape (rows, columns): int64 (tiles, 256)."""
    counts = torch.nn.functional.pad(_counts(symbols), (0, 0, 0, -len(symbols) % TILE_ROWS))
    return counts.reshape(-1, TILE_ROWS, 256).sum(1)


def _best_fields(counts: Tensor) -> tuple[Tensor, Tensor]:
    """The cheapest width and its base for each row of counts."""
    choices = [fullest_windows(counts, torch.full_like(counts[:, 0], bits)) for bits in range(1, MOST_BITS + 1)]
    total = counts.sum(1)
    costs = torch.stack([bits * total + outside * _PATCH_COST for bits, (_, outside) in enumerate(choices, 1)])
    best = costs.argmin(0)
    return best + 1, torch.stack([base for base, _ in choices]).gather(0, best[None])[0]


def fullest_windows(counts: Tensor, bits: Tensor) -> tuple[Tensor, Tensor]:
    """Find the base of the fullest window of 2^bits symbols, and the symbols outside of it, for each row of counts.

    Args:
        counts: int64, shape (n, 256).
        bits: int64, shape (n,).
    """
    sums = torch.nn.functional.pad(counts.cumsum(1), (1, 0))
    end = torch.arange(257, device=counts.device)
    begins = (end[None] - (1 << bits)[:, None]).clamp(min=0)
    inside = sums - sums.gather(1, begins)
    # Of equally full windows the first one whose base is not negative.
    inside = inside.masked_fill(end[None] < (1 << bits)[:, None], -1)
    found, last = inside.max(1)
    return last - (1 << bits), counts.sum(1) - found


def pack_flat(
    name: str,
    symbols: Tensor,
    scale: Tensor,
    offset: Tensor | None = None,
    column_scale: Tensor | None = None,
    widths: Widths | None = None,
) -> FlatPart:
    """Write a matrix in fields of fixed width.

    Args:
        name: the matrix's name, for errors.
        symbols: uint8, shape (rows, columns), on the device.
        scale, offset: float32, shape (1,) or (rows,); `None` for an offset of 0.
        column_scale: float32, shape (columns,), or `None` if absent.
        widths: from `choose_widths`, if known already.
    Raises:
        UnsupportedError: rows are longer than exact sums allow.
    """
    device = symbols.device
    rows, columns = symbols.shape
    if columns > MAX_COLUMNS:
        raise UnsupportedError(f"{name}: the GPU kernels take at most {MAX_COLUMNS} columns, this has {columns}")
    widths = choose_widths(symbols) if widths is None else widths
    order, bits, base = widths.order, widths.bits, widths.base
    ends = torch.bincount(bits, minlength=MOST_BITS + 1)[1:].cumsum(0).tolist()
    data, patches = [], []
    for (begin, end), width in zip(itertools.pairwise((0, *ends)), range(1, MOST_BITS + 1), strict=True):
        for first, last in _batches(begin, end, columns):
            part = symbols[order[first * TILE_ROWS : last * TILE_ROWS]]
            fields, outside = _fields(part, base[first:last], width)
            data.append(_packed(fields, width))
            patches.append((outside[0] + first, *outside[1:]))
    tile, row, column, difference = (torch.cat(values) for values in zip(*patches, strict=True))
    patch_ends = torch.bincount(tile, minlength=len(bits)).cumsum(0)
    patch_begins = torch.nn.functional.pad(patch_ends[:-1], (1, 0))
    words = torch.nn.functional.pad(row_words(order, scale, offset), (0, 0, 0, -rows % TILE_ROWS))
    rest = torch.stack([base, patch_begins, patch_ends, torch.zeros_like(base)], 1).to(torch.int32)
    return FlatPart(
        name,
        rows,
        columns,
        torch.cat(data),
        torch.cat([words.reshape(len(bits), -1), rest], 1),
        (row + (difference + 256 << 4) + (column << 13)).to(torch.int32),
        tuple(ends),
        positions_of(order),
        padded_scales(column_scale, device),
    )


def _batches(begin: int, end: int, columns: int) -> Iterator[tuple[int, int]]:
    step = max(1, BATCH_WEIGHTS // (TILE_ROWS * columns))
    for first in range(begin, end, step):
        yield first, min(end, first + step)


def _fields(symbols: Tensor, base: Tensor, bits: int) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The fields of some tiles, uint8 (tiles, 16, stripes * 256), and their patches by tile and column."""
    tiles = len(base)
    columns = symbols.shape[1]
    missing = tiles * TILE_ROWS - len(symbols)
    signed = torch.nn.functional.pad(symbols, (0, 0, 0, missing)).to(torch.int16).reshape(tiles, TILE_ROWS, columns)
    signed -= base[:, None, None].to(torch.int16)
    if missing:
        signed[-1, TILE_ROWS - missing :] = 0
    fields = signed.clamp(0, (1 << bits) - 1)
    difference = signed.sub_(fields)
    # By column first, so that the patches of some columns lie together.
    tile, column, row = difference.transpose(1, 2).nonzero(as_tuple=True)
    outside = tile, row, column, difference[tile, row, column].long()
    return torch.nn.functional.pad(fields.to(torch.uint8), (0, -columns % STRIPE_COLUMNS)), outside


def _packed(fields: Tensor, bits: int) -> Tensor:
    """Fields as lanes load them: uint8 (tiles, 16, columns) -> bytes."""
    tiles, _, columns = fields.shape
    # half of the rows, lane's row; stripe, step, half of the columns, quarter, byte
    parts = fields.reshape(tiles, 2, 8, columns // STRIPE_COLUMNS, STRIPE_STEPS, 2, 4, 4)
    words = parts.permute(0, 3, 4, 5, 1, 2, 6, 7).reshape(tiles, columns // STRIPE_COLUMNS, 4 * STRIPE_STEPS, LANES, 4)
    sets = []
    below = 0
    for width in (8,) if bits == 8 else (width for width in _SETS if bits & width):
        values = words >> below & (1 << width) - 1
        values = values.reshape(*words.shape[:2], -1, 8 // width, LANES, 4)
        shifts = torch.arange(0, 8, width, dtype=torch.uint8, device=fields.device)[:, None, None]
        sets.append((values << shifts).sum(3, dtype=torch.uint8))
        below += width
    joined = torch.cat(sets, 2)  # tile, stripe, word, lane, byte
    return joined.reshape(*joined.shape[:2], bits, 4, LANES, 4).transpose(3, 4).reshape(-1)
