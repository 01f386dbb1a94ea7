"""Parts of coded matrices for tensor parallelism: each process holds its rows or columns.

A part is cut out when the model is loaded: decoded, and coded again with the matrix's own code, so that its weights are
exactly those of the whole matrix. Parts of rows with a trellis get a code of half steps, since the grid of a weight
depends on those before it.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from entrollm import _core
from entrollm.codec.blocks import blocks_for, choose_blocks
from entrollm.codec.choose import choose_code
from entrollm.codec.encode import encode_symbols, row_chunks
from entrollm.errors import UnsupportedError
from entrollm.format import layout
from entrollm.format.blocks import block_count
from entrollm.format.entry import join_arrays
from entrollm.format.grid import GridKind
from entrollm.format.group_scales import GroupedKind
from entrollm.format.reader import CompressedModel
from entrollm.format.spec import TensorSpec
from entrollm.matrix import code_of, matrix_of
from entrollm.threads import start_pool
from entrollm.torch.backend import storage_device
from entrollm.torch.entries import to_tensor
from entrollm.torch.weight import CodedWeight

Range = tuple[int, int]
Axis = Literal[0, 1] | None
"""What is split: 0 the rows, 1 the columns, `None` nothing."""


class PartCutter:
    """Cuts one process's parts out of stored matrices.

    Args:
        stored: the folder.
        rank: the process's number.
        size: processes that share the matrices.
    """

    def __init__(self, stored: CompressedModel, rank: int, size: int) -> None:
        self._stored = stored
        self._rank = rank
        self._size = size
        self._pool = start_pool()

    def part(self, name: str, length: int) -> Range:
        """This process's range of an axis, split as torch splits it.

        Raises:
            ValueError: the axis is too short for this number of processes.
        """
        step = -(-length // self._size)
        begin, end = self._rank * step, min(length, (self._rank + 1) * step)
        if begin >= end:
            raise ValueError(f"{name}: {length} cannot be split over {self._size} processes; use fewer")
        return begin, end

    def fill(self, weight: CodedWeight, axis: Axis) -> None:
        """Give a coded weight the entries of this process's part.

        Raises:
            UnsupportedError: the matrix has group scales and would be split.
            ValueError: the axis is too short for this number of processes.
        """
        spec = self._stored.specs[weight.name]
        arrays = self._stored.entries(weight.name)
        if axis is not None:
            if isinstance(spec.kind, GroupedKind):
                raise UnsupportedError(
                    f"{weight.name}: matrices with group scales are not split over processes; use device_map instead"
                )
            rows = self.part(weight.name, spec.rows) if axis == 0 else (0, spec.rows)
            columns = self.part(weight.name, spec.columns) if axis == 1 else (0, spec.columns)
            spec, arrays = self._cut(weight.name, spec, rows, columns)
            weight.is_part = True
        device = storage_device(weight.device)
        weight.fill(spec, {suffix: to_tensor(array).to(device) for suffix, array in arrays.items() if array.size})
        self._stored.release(weight.name)

    def _cut(
        self, name: str, spec: TensorSpec, rows: Range, columns: Range
    ) -> tuple[TensorSpec, dict[str, NDArray[Any]]]:
        arrays = self._stored.matrix_arrays(name)
        shape = (rows[1] - rows[0], columns[1] - columns[0])
        if isinstance(spec.kind, GridKind) and spec.has_trellis and shape[1] != spec.columns:
            symbols = matrix_of(self._stored, name).symbols(*rows, self._pool)[:, slice(*columns)]
            counts = [int(c) for c in _core.histogram(np.ascontiguousarray(symbols))]
            code = choose_code(counts, block_count(*shape, choose_blocks(*shape)))
            spec = replace(spec, code=code, kind=replace(spec.kind, trellis=False))
        else:
            symbols = code_of(self._stored, name).symbols(*rows, self._pool)[:, slice(*columns)]
        blocks = blocks_for(spec.code, *shape)
        chunks = row_chunks(*shape, blocks)
        coded: dict[str, NDArray[Any]]
        with ThreadPoolExecutor(self._pool.size) as executor:
            symbols = np.ascontiguousarray(symbols)
            coded = encode_symbols(symbols, spec.code, blocks, chunks, executor, lambda done: None)
        for suffix, axis in ((layout.SCALE, rows), (layout.OFFSET, rows), (layout.COLUMN_SCALE, columns)):
            if suffix in arrays:
                coded[suffix] = arrays[suffix] if arrays[suffix].size == 1 else arrays[suffix][slice(*axis)]
        if layout.LOW in arrays:
            low = arrays[layout.LOW][: spec.rows * spec.columns].reshape(spec.rows, spec.columns)
            coded[layout.LOW] = layout.padded_stream([low[slice(*rows), slice(*columns)].reshape(-1)])
        part = replace(spec, rows=shape[0], columns=shape[1], blocks=blocks, checksum=0, parts=None)
        return join_arrays(part, coded)


def without_entries(stored: CompressedModel, name: str, dtype: torch.dtype) -> CodedWeight:
    """Make a coded weight whose entries `PartCutter.fill` provides later."""
    return CodedWeight(name, stored.specs[name], {}, dtype, torch.device("meta"))
