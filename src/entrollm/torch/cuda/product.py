"""Launch the product of matrices with a few vectors."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from entrollm.torch.cuda.compile import Macros
from entrollm.torch.cuda.device_matrix import DeviceMatrix
from entrollm.torch.cuda.gpu import gpu_of
from entrollm.torch.cuda.launch import TYPES, ProductStruct, divisor, function
from entrollm.torch.cuda.layout import padded_columns
from entrollm.torch.cuda.plan import Plan, plan_of


def product_plan(parts: Sequence[DeviceMatrix], batch: int, device: torch.device) -> Plan:
    """Plan the shared memory of the product of some matrices with `batch` vectors."""
    gpu = gpu_of(device)
    columns = padded_columns(parts[0].shape.columns)
    raw = any(part.code.raw_bits for part in parts)
    chunk_bytes = max(part.chunks.largest_bytes for part in parts)
    if gpu.tuning.tile_bytes and sum(part.shape.tiles for part in parts) <= 2 * gpu.multiprocessors:
        # A block for each tile: the next product gets ready beside the last blocks of this one.
        half = plan_of(gpu, batch, columns, raw, chunk_bytes, blocks=2)
        if half.slots >= max(part.shape.chunks for part in parts):
            return half
    return plan_of(gpu, batch, columns, raw, chunk_bytes)


def product_macros(plan: Plan, batch: int, dtype: int) -> Macros:
    """What the compiler must know about a product with `batch` vectors of a type, by its number in TYPES."""
    slots = plan.tuning.slots(batch)
    return (
        ("BATCH", batch),
        ("TYPE", dtype),
        ("THREADS", plan.threads),
        ("BLOCKS", plan.blocks),
        ("SLOTS", slots.chunks),
        ("OPEN_TILES", slots.open_tiles),
        *plan.table.macros(),
    )


def product_struct(plan: Plan, columns: int, y_stride: int) -> ProductStruct:
    """What product kernels must know about a plan, and vectors of padded `columns` and of `y_stride` outputs."""
    return ProductStruct(
        columns=columns,
        y_stride=y_stride,
        slots=divisor(plan.slots),
        slot_bytes=plan.slot_bytes,
        triple_bytes=plan.triple_bytes,
        raw_bytes=plan.raw_bytes,
        in_front=plan.in_front,
        front_slots=plan.front_slots,
        early=plan.early,
    )


class Product:
    """The product of some matrices, decoded as they are multiplied, with a fixed number of vectors of one type.

    Raises:
        UnsupportedError: the GPU is too old, or the kernel cannot be compiled.
    """

    def __init__(self, parts: Sequence[DeviceMatrix], batch: int, dtype: torch.dtype, device: torch.device) -> None:
        gpu = gpu_of(device)
        plan = product_plan(parts, batch, device)
        self._threads = plan.threads
        self._overlaps = gpu.tuning.overlaps
        macros = product_macros(plan, batch, TYPES[dtype])
        self._function = function("product.cu", "multiply", device, macros, plan.end_bytes)
        structs = []
        y_begin = cta_begin = 0
        tiles = [part.shape.tiles for part in parts]
        ctas = tiles if plan.blocks > 1 else _share(parts, gpu.multiprocessors)
        for part, count in zip(parts, ctas, strict=True):
            structs.append(part.struct(y_begin, cta_begin, count))
            y_begin += part.shape.rows
            cta_begin += count
        self._grid = cta_begin
        self._struct = product_struct(plan, padded_columns(parts[0].shape.columns), y_begin)
        self._struct.matrices = tuple(structs)
        self._struct.count = len(parts)

    def __call__(self, x: Tensor, y: Tensor) -> None:
        """Multiply `x` into `y`. Both are contiguous and of the product's type; rows of `x` are padded."""
        self._struct.x = x.data_ptr()
        self._struct.y = y.data_ptr()
        self._function.launch([self._struct], self._grid, self._threads, self._overlaps)


def _share(parts: Sequence[DeviceMatrix], ctas: int) -> list[int]:
    """Share out blocks among matrices by their size in bytes; each gets at least one."""
    sizes = np.array([part.chunks.data.numel() for part in parts], np.float64)
    edges = np.rint(sizes.cumsum() / sizes.sum() * (ctas - len(parts))).astype(int)
    return [int(count) + 1 for count in np.diff(edges, prepend=0)]
