"""Flat matrices on one GPU: multiply by them, look up rows, decode them."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from entrollm.torch.cuda.compile import Macros
from entrollm.torch.cuda.flat import MOST_BITS, STRIPE_COLUMNS, STRIPE_STEPS, FlatPart
from entrollm.torch.cuda.flat_plan import FlatPlan, block_groups, flat_plan, launch_vectors
from entrollm.torch.cuda.gpu import Gpu, gpu_of
from entrollm.torch.cuda.launch import MAX_MATRICES, TYPES, DivisorStruct, divisor, function
from entrollm.torch.cuda.layout import STEP_BYTES, TILE_ROWS, padded_columns
from entrollm.torch.cuda.parted import PartedMatrix

_DECODE_THREADS = 256
_PREPARE_THREADS = 512
_CLEARING_BLOCKS = 64


class FlatMatrixStruct(ctypes.Structure):
    """`FlatMatrix` of flat.cuh."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("heads", ctypes.c_void_p),
        ("patches", ctypes.c_void_p),
        ("column_scale", ctypes.c_void_p),
        ("rows", ctypes.c_int),
        ("tiles", ctypes.c_int),
        ("stripes", ctypes.c_int),
        ("tile_ends", ctypes.c_int * MOST_BITS),
        ("y_begin", ctypes.c_int),
        ("cta_begin", ctypes.c_int),
        ("groups", DivisorStruct),
    )


class FlatProductStruct(ctypes.Structure):
    """`Launch` of flat_product.cu."""

    _fields_ = (
        ("matrices", FlatMatrixStruct * MAX_MATRICES),
        *((name, ctypes.c_void_p) for name in ("x", "y", "digits", "numbers", "scales", "totals")),
        ("partial", ctypes.c_void_p),
        ("arrived", ctypes.c_void_p),
        *((name, ctypes.c_int) for name in ("count", "columns", "y_stride", "vectors")),
        ("splits", DivisorStruct),
        ("shares", DivisorStruct),
    )


class FlatPrepareStruct(ctypes.Structure):
    """`Launch` of flat_prepare.cu."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("x", "column_scale", "digits", "numbers", "scales", "totals")),
        ("cleared", ctypes.c_void_p),
        *((name, ctypes.c_int) for name in ("clear_pieces", "vectors", "columns", "words")),
    )


class FlatDecodeStruct(ctypes.Structure):
    """`Launch` of flat_decode.cu."""

    _fields_ = (
        ("matrix", FlatMatrixStruct),
        ("rows", ctypes.c_void_p),
        ("positions", ctypes.c_void_p),
        ("out", ctypes.c_void_p),
        ("columns", ctypes.c_int),
    )


def matrix_struct(part: FlatPart, y_begin: int = 0, cta_begin: int = 0, groups: int = 1) -> FlatMatrixStruct:
    """A matrix as an argument of kernels.

    Args:
        part: the matrix.
        y_begin: where its outputs begin in a vector of outputs.
        cta_begin: the first block that works on it.
        groups: the groups of blocks that do.
    """
    return FlatMatrixStruct(
        part.data.data_ptr(),
        part.heads.data_ptr(),
        part.patches.data_ptr(),
        None if part.column_scale is None else part.column_scale.data_ptr(),
        part.rows,
        part.tiles,
        part.stripes,
        part.tile_ends,
        y_begin,
        cta_begin,
        divisor(groups),
    )


def decode_macros(part: FlatPart, dtype: int) -> Macros:
    """What the compiler must know to decode to a type, by its number in TYPES."""
    low, high = part.widths
    return (("TYPE", dtype), ("THREADS", _DECODE_THREADS), ("MIN_BITS", low), ("MAX_BITS", high))


def decode_flat(part: FlatPart, out: Tensor, ids: Tensor | None, device: torch.device) -> None:
    """Decode a matrix to contiguous memory.

    Args:
        part: the matrix.
        out: (rows, columns), contiguous.
        ids: int64, the rows to decode, each within the matrix; `None` for all.
        device: the GPU.
    """
    struct = FlatDecodeStruct(
        matrix_struct(part),
        None if ids is None else ids.data_ptr(),
        part.positions.data_ptr(),
        out.data_ptr(),
        part.columns,
    )
    kernel = function("flat_decode.cu", "decode_flat", device, decode_macros(part, TYPES[out.dtype]), 0)
    kernel.launch([struct], part.tiles if ids is None else len(ids), _DECODE_THREADS, overlap=False)


class FlatProduct:
    """The product of some flat matrices with up to a number of vectors of one type."""

    def __init__(self, parts: Sequence[FlatPart], plan: FlatPlan, dtype: torch.dtype, device: torch.device) -> None:
        gpu = gpu_of(device)
        self.plan = plan
        self._device = device
        self._overlaps = gpu.tuning.overlaps
        widths = min(part.widths[0] for part in parts), max(part.widths[1] for part in parts)
        macros = plan.macros(widths, gpu.tuning.flat_ahead, TYPES[dtype])
        self._function = function("flat_product.cu", "multiply_flat", device, macros, plan.end_bytes)
        structs = []
        y_begin = cta_begin = 0
        groups = block_groups([part.data.numel() for part in parts], gpu.multiprocessors // plan.splits)
        for part, count in zip(parts, groups, strict=True):
            structs.append(matrix_struct(part, y_begin, cta_begin, count))
            y_begin += part.rows
            cta_begin += count * plan.splits
        self._grid = cta_begin
        columns = padded_columns(parts[0].columns)
        self._struct = FlatProductStruct(
            matrices=tuple(structs),
            count=len(parts),
            columns=columns,
            y_stride=y_begin,
            splits=divisor(plan.splits),
            shares=divisor(plan.shares),
        )
        self._prepares = _Preparation(parts, plan, dtype, device) if plan.prepared else None

    def __call__(self, x: Tensor, y: Tensor) -> None:
        """Multiply `x` into `y`. Both are contiguous and of the product's type; rows of `x` are padded."""
        self._struct.x = x.data_ptr()
        self._struct.y = y.data_ptr()
        self._struct.vectors = len(x)
        workspace = None if self._prepares is None else self._prepares(x, self._struct)
        self._function.launch([self._struct], self._grid, self.plan.threads, self._overlaps)
        del workspace  # until here, nobody else got its memory


class _Preparation:
    """Rounds the vectors of a product, in memory that each call gets from torch."""

    def __init__(self, parts: Sequence[FlatPart], plan: FlatPlan, dtype: torch.dtype, device: torch.device) -> None:
        self._device = device
        self._overlaps = gpu_of(device).tuning.overlaps
        macros = (("BATCH", plan.vectors), ("TYPE", TYPES[dtype]), ("THREADS", _PREPARE_THREADS))
        self._function = function("flat_prepare.cu", "prepare_flat", device, macros, 0)
        stripes, tiles = parts[0].stripes, sum(part.tiles for part in parts)
        is_split = plan.splits > 1
        sizes = {
            "digits": stripes * STRIPE_STEPS * STEP_BYTES * plan.vectors,
            "numbers": stripes * STRIPE_COLUMNS * plan.vectors * 2,
            "scales": plan.vectors * 4,
            "totals": plan.vectors * 4,
            "partial": tiles * TILE_ROWS * plan.vectors * 8 if is_split else 0,
            "arrived": -(-tiles * 4 // 16) * 16 if is_split else 0,
        }
        self._begins = {}
        self._size_bytes = 0
        for name, size in sizes.items():
            self._begins[name] = self._size_bytes
            self._size_bytes += size
        self._blocks = plan.vectors + (_CLEARING_BLOCKS if is_split else 0)
        column_scale = parts[0].column_scale
        self._struct = FlatPrepareStruct(
            column_scale=None if column_scale is None else column_scale.data_ptr(),
            clear_pieces=(sizes["partial"] + sizes["arrived"]) // 16,
            columns=padded_columns(parts[0].columns),
            words=stripes * STRIPE_COLUMNS // 4,
        )

    def __call__(self, x: Tensor, product: FlatProductStruct) -> Tensor:
        """Round `x` for a product; returns the memory that must live until that is launched."""
        workspace = torch.empty(self._size_bytes, dtype=torch.uint8, device=self._device)
        for name, begin in self._begins.items():
            setattr(product, name, workspace.data_ptr() + begin)
        struct = self._struct
        for name in ("digits", "numbers", "scales", "totals"):
            setattr(struct, name, getattr(product, name))
        struct.cleared = product.partial
        struct.x = x.data_ptr()
        struct.vectors = len(x)
        self._function.launch([struct], self._blocks, _PREPARE_THREADS, self._overlaps)
        return workspace


class FlatCudaMatrix(PartedMatrix[FlatPart, FlatProduct]):
    """Flat matrices, one below the other, on one GPU."""

    def multiply(self, x: Tensor) -> Tensor:
        """Multiply: (n, in_features) -> (n, out_features) in the type of x, which is float32, bfloat16 or float16.

        Fields go from memory to the matrix unit, for up to 32 vectors at a time. For many vectors, the matrix is first
        decoded to memory in the type of x.
        """
        if x.shape[0] > self._gpu.tuning.flat_batch:
            return x @ self.dequantize(x.dtype).T
        if self._singles and len(x) > self._gpu.tuning.flat_rounded:
            return torch.cat([single.multiply(x) for single in self._singles], dim=1)
        return self._launch(x, launch_vectors(self._gpu, self.parts[0].stripes, self._most_bits, x.shape[0]))

    def plan(self, batch: int) -> FlatPlan:
        """How the product with `batch` vectors is divided."""
        tiles = tuple(part.tiles for part in self.parts)
        return flat_plan(self._gpu, tiles, self.parts[0].stripes, self._most_bits, batch)

    @functools.cached_property
    def _most_bits(self) -> int:
        return max(part.widths[1] for part in self.parts)

    @functools.cached_property
    def _singles(self) -> list[FlatCudaMatrix]:
        """Each matrix alone, if they scale vectors differently: these are scaled before one kernel rounds them."""
        if len(self.parts) == 1 or all(part.column_scale is None for part in self.parts):
            return []
        return [FlatCudaMatrix([part], self.device) for part in self.parts]

    @property
    def _gpu(self) -> Gpu:
        return gpu_of(self.device)

    def _make_product(self, batch: int, dtype: torch.dtype) -> FlatProduct:
        return FlatProduct(self.parts, self.plan(batch), dtype, self.device)

    def _decode(self, part: FlatPart, out: Tensor, ids: Tensor | None) -> None:
        decode_flat(part, out, ids, self.device)
