"""Lossless bfloat16 matrices in GPU memory: exponents in fields of 3 bits, and signs and mantissas in bytes.

All of this module is plain torch operations, so that it runs, and is tested, on any device; kernels/lossless.cuh
describes the layout too.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from entrollm.errors import UnsupportedError
from entrollm.torch.cuda.chunks import BATCH_WEIGHTS
from entrollm.torch.cuda.flat import fullest_windows, tile_counts
from entrollm.torch.cuda.layout import LANES, MAX_COLUMNS, TILE_ROWS

STRIPE_COLUMNS = 256
_FIELD_BITS = 3
_WORD_FIELDS = 5  # in each half of a word of exponents, above one spare bit
_WORDS = 3  # words of exponents that a lane has of a quarter
_MOST_FIELD = (1 << _FIELD_BITS) - 1


@dataclass(frozen=True)
class LosslessPart:
    """One bfloat16 matrix in GPU memory, bit for bit.

    Attributes:
        name: the matrix's name, for errors.
        rows, columns: its shape.
        data: uint8, the stripes of all tiles.
        bases: int32, shape (tiles,), the exponent whose field is 0.
        patch_begins: int32, shape (16 * tiles + 1,), where the patches of every row begin, and where the last end.
        patches: int32, the bits of a weight, and its column in the lower half, by row and column.
    """

    name: str
    rows: int
    columns: int
    data: Tensor
    bases: Tensor
    patch_begins: Tensor
    patches: Tensor

    @property
    def tiles(self) -> int:
        """Tiles of sixteen rows; the last may have fewer."""
        return len(self.bases)

    @property
    def stripes(self) -> int:
        """Stripes of 256 columns of a tile; the last may have fewer."""
        return -(-self.columns // STRIPE_COLUMNS)

    @property
    def size_bytes(self) -> int:
        """GPU memory in use."""
        return self.data.numel() + 4 * (len(self.bases) + len(self.patch_begins) + len(self.patches))


def pack_lossless(name: str, words: Tensor) -> LosslessPart:
    """Write a bfloat16 matrix in the GPU's layout.

    Args:
        name: the matrix's name, for errors.
        words: bfloat16, shape (rows, columns), on the device.
    Raises:
        UnsupportedError: rows are longer than patches can say.
    """
    rows, columns = words.shape
    if columns > MAX_COLUMNS:
        raise UnsupportedError(f"{name}: the GPU kernels take at most {MAX_COLUMNS} columns, this has {columns}")
    bits = words.view(torch.int16)
    step = max(1, BATCH_WEIGHTS // (TILE_ROWS * columns)) * TILE_ROWS
    data, bases, counts, patches = zip(*(_packed(part) for part in torch.split(bits, step)), strict=True)
    ends = torch.cat(counts).cumsum(0)
    begins = torch.nn.functional.pad(ends, (1, 0))
    return LosslessPart(
        name, rows, columns, torch.cat(data), torch.cat(bases), begins.to(torch.int32), torch.cat(patches)
    )


def _packed(words: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Some tiles: their data, the base of each, how many patches each row has, and the patches."""
    rows, columns = words.shape
    tiles = -(-rows // TILE_ROWS)
    bits = words.to(torch.int32) & 0xFFFF
    exponents = (bits >> 7 & 0xFF).to(torch.uint8)
    base, _ = fullest_windows(tile_counts(exponents), torch.full((tiles,), _FIELD_BITS, device=words.device))
    fields = exponents.to(torch.int16) - base.to(torch.int16).repeat_interleave(TILE_ROWS)[:rows, None]
    outside = (fields < 0) | (fields > _MOST_FIELD)
    row, column = outside.nonzero(as_tuple=True)
    patches = bits[row, column] << 16 | column.to(torch.int32)
    missing = tiles * TILE_ROWS - rows
    counts = torch.nn.functional.pad(outside.sum(1), (0, missing))
    signs_mantissas = (bits >> 8 & 0x80 | bits & 0x7F).to(torch.uint8)
    lanes = [
        _by_lane(torch.nn.functional.pad(part.masked_fill(outside, 0), (0, -columns % STRIPE_COLUMNS, 0, missing)))
        for part in (fields.to(torch.uint8), signs_mantissas)
    ]
    pieces = torch.cat([_bytes_of(lanes[1]), _exponents_of(lanes[0])], 2)
    return pieces.reshape(-1), base.to(torch.int32), counts, patches


def _by_lane(values: Tensor) -> Tensor:
    """Values of some tiles as lanes have them.

    Args:
        values: uint8, shape (16 * tiles, 256 * stripes).
    Returns:
        uint8, shape (tiles, stripes, quarters, 4 steps, 2 pairs of columns, 2 halves of the rows, 32 lanes, 2).
    """
    rows, columns = values.shape
    # half of the rows, lane's row; stripe, quarter, half of it, lane's columns, step, pair, column
    parts = values.reshape(rows // TILE_ROWS, 2, 8, columns // STRIPE_COLUMNS, 4, 2, 4, 2, 2, 2)
    return parts.permute(0, 3, 4, 5, 7, 8, 1, 2, 6, 9).reshape(
        rows // TILE_ROWS, columns // STRIPE_COLUMNS, 4, 4, 2, 2, LANES, 2
    )


def _bytes_of(values: Tensor) -> Tensor:
    """Signs and mantissas, four neighbours a word: the bytes of eight rows of pieces of every stripe."""
    words = values.permute(0, 1, 2, 3, 5, 6, 4, 7).reshape(*values.shape[:2], -1, 4, LANES, 4)
    return words.transpose(3, 4).reshape(*values.shape[:2], -1, LANES, 16)


def _exponents_of(fields: Tensor) -> Tensor:
    """Fields of exponents, three words for 16 pairs: the bytes of three rows of pieces of every stripe."""
    tiles, stripes = fields.shape[:2]
    pairs = fields.reshape(tiles, stripes, 4, 4 * 2 * 2, LANES, 2).to(torch.int32)
    stored = pairs[:, :, :, :-1].reshape(tiles, stripes, 4, _WORDS, _WORD_FIELDS, LANES, 2)
    places = torch.arange(_WORD_FIELDS, dtype=torch.int32, device=fields.device) * _FIELD_BITS + 1
    halves = (stored << places[:, None, None]).sum(4, dtype=torch.int32)
    bit = torch.arange(_WORDS, dtype=torch.int32, device=fields.device)[:, None, None]
    halves |= pairs[:, :, :, -1:] >> bit & 1
    words = torch.stack([halves & 0xFF, halves >> 8], -1).to(torch.uint8)  # low byte first
    return words.reshape(tiles, stripes, -1, 4, LANES, 4).transpose(3, 4).reshape(tiles, stripes, -1, LANES, 16)
