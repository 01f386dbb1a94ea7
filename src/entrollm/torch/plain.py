"""The plain back end: coded matrices in plain torch operations, on any device.

It is slow, and decodes to the same bits as `entrollm.codec.reference`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from entrollm.errors import CorruptStreamError, UnsupportedError
from entrollm.format import layout
from entrollm.format.blocks import padded
from entrollm.format.entry import split_entries_with
from entrollm.format.flat import FlatCode
from entrollm.format.grid import GridKind
from entrollm.format.log_scales import decode_scales
from entrollm.format.lossless import LosslessKind
from entrollm.format.spec import TensorSpec
from entrollm.torch.bit_fields import DenseFields, Node, Stream, children, decode_lists, dense_bytes, width_of
from entrollm.torch.entries import WORD_TYPES

# Weights that are decoded at a time. Index tensors take a few hundred bytes for every 16 weights.
_CHUNK_WEIGHTS = 1 << 20
_KNOWN = frozenset(
    {layout.CODED, layout.LOW, layout.DENSE, layout.SPARSE, layout.SPARSE_SIZES}
    | {layout.SCALE, layout.OFFSET, layout.COLUMN_SCALE}
)


class PlainMatrix:
    """A coded matrix that decodes with torch operations on the device where its stored entries are.

    Args:
        name: the tensor's name, for errors.
        spec: the matrix's spec; the caller has checked that the entries match it.
        entries: its stored entries by suffix, on the device.
        device: where it decodes.
    Raises:
        UnsupportedError: this back end does not decode one of the entries, or group scales.
    """

    def __init__(self, name: str, spec: TensorSpec, entries: Mapping[str, Tensor], device: torch.device) -> None:
        if unknown := sorted(set(entries) - _KNOWN):
            raise UnsupportedError(f"{name}: its entry {unknown[0][1:]} is not decoded by plain torch operations")
        self.shape = (spec.rows, spec.columns)
        self._name = name
        self._spec = spec
        slices, small = split_entries_with(name, spec, entries, lambda side: side.cpu().numpy())
        self._entries: dict[str, Tensor] = {**slices, **{suffix: _to_device(a, device) for suffix, a in small.items()}}
        self._device = device
        self._padded = padded(spec.columns)
        if isinstance(spec.code, FlatCode):
            raise UnsupportedError(f"{name}: flat codes are not decoded by plain torch operations")
        self._tree: Node = spec.code.tree
        self._low_bits = spec.code.low_bits
        sizes = self._entries.get(layout.SPARSE_SIZES)
        # The entry holds unsigned 16-bit integers, which some devices lack.
        self._sizes = None if sizes is None else sizes.view(torch.int16).to(torch.int64) & 0xFFFF
        self._starts = None if self._sizes is None else torch.cumsum(self._sizes, 0) - self._sizes
        kind = spec.kind
        if isinstance(kind, LosslessKind):
            return
        if not isinstance(kind, GridKind):
            raise UnsupportedError(f"{name}: matrices with group scales are not decoded by plain torch operations")
        self._forms = kind.stored
        self._scale = self._scales(layout.SCALE, kind.scale)
        self._offset = self._scales(layout.OFFSET, kind.offset)
        if kind.zero is not None and self._scale is not None:
            self._offset = self._scale * -float(kind.zero)
        self._column_scale = self._scales(layout.COLUMN_SCALE, None)

    def multiply(self, x: Tensor) -> Tensor:
        """Multiply: (n, in_features) -> (n, out_features) in the type of x.

        Raises:
            CorruptStreamError: a block does not decode.
        """
        parts = [functional.linear(x, self._weights(chunk).to(x.dtype)) for chunk in self._chunks()]
        return torch.cat(parts, dim=1)

    def rows(self, ids: Tensor) -> Tensor:
        """Look up rows: integers (n,) -> float32 (n, in_features).

        Raises:
            CorruptStreamError: a block does not decode.
            IndexError: an id is outside of the matrix.
        """
        if ids.numel() == 0:
            return torch.empty((0, self.shape[1]), device=self._device)
        if not bool(((ids >= 0) & (ids < self.shape[0])).all()):
            raise IndexError(f"{self._name}: a row is looked up that is outside of its {self.shape[0]} rows")
        block_rows = self._spec.blocks.rows
        row_blocks, index = torch.unique(ids // block_rows, return_inverse=True)
        # Only the last row block may have fewer rows, and it sorts last, so it does not move the rows of any other.
        return self._weights(row_blocks)[index * block_rows + ids % block_rows]

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """Decode all weights: (out_features, in_features).

        Raises:
            CorruptStreamError: a block does not decode.
        """
        return torch.cat([self._weights(chunk).to(dtype) for chunk in self._chunks()])

    def symbols(self, row_blocks: Tensor) -> Tensor:
        """Decode row blocks, given by ascending numbers, with a trellis to half steps: uint8 (their rows, in_features).

        Raises:
            CorruptStreamError: a block does not decode.
        """
        spec = self._spec
        last_rows = spec.rows - (self._row_blocks() - 1) * spec.blocks.rows
        has_short = last_rows < spec.blocks.rows and int(row_blocks[-1]) == self._row_blocks() - 1
        whole = row_blocks[:-1] if has_short else row_blocks
        decoded = [self._decode_row_blocks(whole, spec.blocks.rows)] if len(whole) else []
        if has_short:
            decoded.append(self._decode_row_blocks(row_blocks[-1:], last_rows))
        symbols = torch.cat(decoded)
        return _half_steps(symbols) if spec.has_trellis else symbols

    def _chunks(self) -> tuple[Tensor, ...]:
        row_blocks = torch.arange(self._row_blocks(), device=self._device)
        chunk = max(1, _CHUNK_WEIGHTS // (self._spec.blocks.rows * self._padded))
        chunks: tuple[Tensor, ...] = torch.split(row_blocks, chunk)
        return chunks

    def _row_blocks(self) -> int:
        return -(-self._spec.rows // self._spec.blocks.rows)

    def _weights(self, row_blocks: Tensor) -> Tensor:
        """The rows of some row blocks in float32, rounded after each operation as the format says."""
        symbols = self.symbols(row_blocks)
        offsets = torch.arange(self._spec.blocks.rows, device=self._device)
        ids = (row_blocks[:, None] * self._spec.blocks.rows + offsets).reshape(-1)[: len(symbols)]
        if isinstance(self._spec.kind, LosslessKind):
            return self._word_values(symbols, ids, self._spec.kind)
        weights = symbols.to(torch.float32)
        rows = slice(0, 1)
        for values, operation in ((self._scale, torch.mul), (self._offset, torch.add)):
            if values is not None:
                weights = operation(weights, values[rows if len(values) == 1 else ids][:, None])
        return weights if self._column_scale is None else weights * self._column_scale

    def _word_values(self, symbols: Tensor, ids: Tensor, kind: LosslessKind) -> Tensor:
        """The values of lossless words, from their symbols and the low bytes of rows `ids`."""
        words, bits = symbols.to(torch.int32), 8
        if kind.has_low:
            low = self._entries[layout.LOW][: self.shape[0] * self.shape[1]].reshape(self.shape)
            words, bits = words << 8 | low[ids].to(torch.int32), 16
        words = words >> 1 | (words & 1) << bits - 1
        # Integers of as many bits, signed since torch does little with others, have the same bytes.
        narrow = (words - (words >> bits - 1 << bits)).to(torch.int16 if bits == 16 else torch.int8)
        return narrow.view(WORD_TYPES[kind.type]).to(torch.float32)

    def _scales(self, suffix: str, value: float | None) -> Tensor | None:
        stored = self._entries.get(suffix)
        form = self._forms.get(suffix[1:])
        if stored is not None and isinstance(form, int):
            base = 1.0 if value is None else value
            return torch.from_numpy(decode_scales(stored.cpu().numpy(), form, base)).to(self._device)
        if value is not None:
            return torch.tensor([value], dtype=torch.float32, device=self._device)
        return None if stored is None else stored.to(torch.float32)

    def _decode_row_blocks(self, row_blocks: Tensor, rows: int) -> Tensor:
        """Decode row blocks of `rows` rows each: uint8 (row_blocks * rows, in_features)."""
        width = self._spec.blocks.columns
        parts = -(-self._padded // width)
        dense_bytes_each = self._dense_size(self._spec.blocks.rows, self._padded)
        at = 0
        decoded = []
        for part in range(parts):
            columns = min(width, self._padded - part * width)
            blocks = row_blocks * parts + part
            symbols = self._decode_blocks(blocks, row_blocks * dense_bytes_each + at, rows * columns)
            decoded.append(symbols.reshape(len(row_blocks), rows, columns))
            at += self._block_size(rows * columns)
        joined = torch.cat(decoded, dim=2).reshape(len(row_blocks) * rows, self._padded)
        return joined[:, : self.shape[1]]

    def _dense_size(self, rows: int, columns: int) -> int:
        width = self._spec.blocks.columns
        return sum(self._block_size(rows * min(width, columns - begin)) for begin in range(0, columns, width))

    def _block_size(self, count: int) -> int:
        return dense_bytes(count, width_of(self._tree)) + dense_bytes(count, self._low_bits)

    def _decode_blocks(self, blocks: Tensor, dense_starts: Tensor, count: int) -> Tensor:
        """Decode blocks of `count` symbols each: uint8 (blocks, count)."""
        dense = self._entries.get(layout.DENSE)
        root = DenseFields(dense, dense_starts, count, width_of(self._tree))
        low = DenseFields(dense, dense_starts + dense_bytes(count, width_of(self._tree)), count, self._low_bits)
        sparse = None
        if children(self._tree):
            assert self._sizes is not None and self._starts is not None
            sparse = Stream(self._entries[layout.SPARSE], self._starts[blocks], self._sizes[blocks])
        symbols = decode_lists(self._tree, root, sparse)
        if symbols is None:
            raise CorruptStreamError(
                f"{self._name}: the lists of a block do not fit it; the file is damaged, compress or fetch it again"
            )
        return symbols | low.values()


def _half_steps(symbols: Tensor) -> Tensor:
    """What the symbols of whole rows stand for with a trellis; see `codec.trellis.half_steps`."""
    parities = symbols & 1
    steps = symbols * 2
    for first in (1, 2):
        grids = torch.cumsum(parities[:, first::2], 1) & 1
        steps[:, first + 1 :: 2] += grids[:, : steps[:, first + 1 :: 2].shape[1]].to(torch.uint8)
    return steps


def _to_device(array: NDArray[Any], device: torch.device) -> Tensor:
    """Copy a small array to a device. 16-bit integers become signed, since some devices lack unsigned ones."""
    if array.dtype == ml_dtypes.bfloat16:
        array = array.astype(np.float32)
    return torch.tensor(array.view(np.int16) if array.dtype == np.uint16 else array, device=device)
