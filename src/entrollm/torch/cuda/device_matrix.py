"""A matrix in the GPU's layout."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from entrollm.torch.cuda.chunks import BATCH_WEIGHTS, Chunks, look_up, write_chunks
from entrollm.torch.cuda.gpu import gpu_of
from entrollm.torch.cuda.launch import MatrixStruct, divisor
from entrollm.torch.cuda.layout import padded_columns
from entrollm.torch.cuda.plan import chunk_limit, plan_of
from entrollm.torch.cuda.rows import padded_scales, positions_of, row_words
from entrollm.torch.cuda.shape import Room, Shape, choose_shape
from entrollm.torch.cuda.triples import TripleCode, choose_triple_code


@dataclass(frozen=True)
class DeviceMatrix:
    """One matrix on a GPU. Rows are sorted by their coded length, which makes a tile's lanes equally long.

    Attributes:
        name: the matrix's name, for errors.
        shape: how it is cut.
        code: the code of its symbols.
        chunks: its chunks.
        table: int32, shape (256,), the code's table.
        bounds: int16, where segments begin, in spans, and where the last ends.
        positions: int32, shape (rows,), the position of each row after sorting.
        column_scale: float32, padded to a multiple of four, or `None` if absent.
    """

    name: str
    shape: Shape
    code: TripleCode
    chunks: Chunks
    table: Tensor
    bounds: Tensor
    positions: Tensor
    column_scale: Tensor | None

    @property
    def rows(self) -> int:
        """Its rows."""
        return self.shape.rows

    @property
    def columns(self) -> int:
        """Its columns."""
        return self.shape.columns

    @property
    def size_bytes(self) -> int:
        """GPU memory in use."""
        tensors = [self.chunks.data, self.chunks.table, self.table, self.bounds, self.positions]
        tensors += [] if self.column_scale is None else [self.column_scale]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    def struct(self, y_begin: int = 0, cta_begin: int = 0, cta_count: int = 1) -> MatrixStruct:
        """The matrix as an argument of kernels.

        Args:
            y_begin: where its outputs begin in a vector of outputs.
            cta_begin, cta_count: the blocks that work on it.
        """
        column_scale = None if self.column_scale is None else self.column_scale.data_ptr()
        return MatrixStruct(
            self.chunks.data.data_ptr(),
            self.chunks.table.data_ptr(),
            self.table.data_ptr(),
            column_scale,
            self.bounds.data_ptr(),
            self.shape.rows,
            self.shape.tiles,
            self.shape.spans,
            divisor(self.shape.chunks),
            divisor(self.shape.segments),
            self.code.raw_bits,
            self.code.base,
            y_begin,
            cta_begin,
            divisor(cta_count),
        )


def transcode(
    name: str,
    symbols: Tensor,
    scale: Tensor,
    offset: Tensor | None = None,
    column_scale: Tensor | None = None,
    code: TripleCode | None = None,
) -> DeviceMatrix:
    """Write a matrix in the GPU's layout.

    Args:
        name: the matrix's name, for errors.
        symbols: uint8, shape (rows, columns), on the device.
        scale, offset: float32, shape (1,) or (rows,); `None` for an offset of 0.
        column_scale: float32, shape (columns,), or `None` if absent.
        code: the code of its symbols, if known already.
    Raises:
        UnsupportedError: the matrix does not fit in the layout.
    """
    device = symbols.device
    rows, columns = symbols.shape
    if code is None:
        code = choose_triple_code(torch.bincount(symbols.reshape(-1), minlength=256).tolist())
    order = _order(symbols, code)
    gpu, padded, raw = gpu_of(device), padded_columns(columns), code.raw_bits > 0
    limit = chunk_limit(gpu, padded, raw)
    room = Room(gpu.tuning, limit, lambda chunk_bytes: plan_of(gpu, 1, padded, raw, chunk_bytes).slots)
    shape = choose_shape(name, rows, columns, code.bits, room)
    words = row_words(order, scale, offset)
    chunks = write_chunks(name, shape, code, words, lambda begin, end: symbols[order[begin:end]], room)
    return DeviceMatrix(
        name,
        chunks.shape,
        code,
        chunks,
        torch.tensor(code.table().view(np.int32), device=device),
        torch.tensor(chunks.shape.segment_bounds(), dtype=torch.int16, device=device),
        positions_of(order),
        padded_scales(column_scale, device),
    )


def _order(symbols: Tensor, code: TripleCode) -> Tensor:
    """Sort rows by the bits that their symbols take on average, longest first."""
    highs = torch.arange(256, device=symbols.device) - code.base >> code.raw_bits
    alone = torch.tensor(code.lengths.reshape(8, 8, 8).mean((1, 2)), dtype=torch.float32, device=symbols.device)
    lengths = alone[highs.clamp(0, 7)]
    batches = torch.split(symbols, max(1, BATCH_WEIGHTS // symbols.shape[1]))
    bits = [look_up(lengths, batch.int()).sum(1) for batch in batches]
    return torch.argsort(torch.cat(bits), descending=True, stable=True)
