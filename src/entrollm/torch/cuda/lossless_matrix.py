"""Lossless bfloat16 matrices on one GPU: multiply by them, look up rows, decode them."""

from __future__ import annotations

import ctypes
import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from entrollm.torch.cuda.compile import Macros
from entrollm.torch.cuda.gpu import RESERVED_BYTES, Gpu, gpu_of
from entrollm.torch.cuda.launch import MAX_MATRICES, TYPES, aligned, function
from entrollm.torch.cuda.layout import LANES, TILE_ROWS, padded_columns
from entrollm.torch.cuda.lossless import STRIPE_COLUMNS, LosslessPart
from entrollm.torch.cuda.parted import PartedMatrix

MAX_BATCH = 24
"""Vectors that the kernel takes in a few launches; for more, the matrix is decoded to memory."""
_LAUNCH_VECTORS = 8
_MOST_LAUNCHES = 5
_DECODE_THREADS = 256
_STRIPE_BYTES = 11 * LANES * 16
# Warps of a block, and stages of each, which hold what is on its way from memory; as many as fit in their share of the
# shared memory. Measured on an H200: with 3 stages, a product with one vector takes 1 to 12 % less time than with 2,
# but vectors need the room from 4 on; 4 or 16 warps are slower.
_STAGES = ((8, 3), (8, 2), (4, 2))
_STAGES_SHARE = 0.62
_FEW_VECTORS = 2
_MOST_GROUP = 16
# The parts in bfloat16 that add up to a value of a type.
_PARTS = {torch.float32: 3, torch.bfloat16: 1, torch.float16: 2}
_MOST_SIDES = 16  # parts of vectors that one launch takes, as sums of more do not fit in registers
_GAP_BYTES = 64  # between parts of x in shared memory


_PRODUCT_NUMBERS = ("count", "tiles", "columns", "y_stride", "stripes", "panel_stripes", "group")


class LosslessMatrixStruct(ctypes.Structure):
    """`LosslessMatrix` of lossless.cuh."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("data", "bases", "patch_begins", "patches")),
        *((name, ctypes.c_int) for name in ("rows", "stripes", "tile_begin", "y_begin")),
    )


class LosslessProductStruct(ctypes.Structure):
    """`Launch` of lossless_product.cu."""

    _fields_ = (
        ("matrices", LosslessMatrixStruct * MAX_MATRICES),
        ("x", ctypes.c_void_p),
        ("y", ctypes.c_void_p),
        *((name, ctypes.c_int) for name in _PRODUCT_NUMBERS),
    )


class LosslessDecodeStruct(ctypes.Structure):
    """`Launch` of lossless_decode.cu."""

    _fields_ = (
        ("matrix", LosslessMatrixStruct),
        ("rows", ctypes.c_void_p),
        ("out", ctypes.c_void_p),
        ("columns", ctypes.c_int),
    )


@dataclass(frozen=True)
class LosslessPlan:
    """How a product is divided.

    Attributes:
        blocks: of the launch.
        warps: of a block.
        stages: stripes of a warp in shared memory.
        group: tiles that the warps of a block share out among them at a time.
        panel_stripes: stripes whose part of the vectors is in shared memory together.
        end_bytes: where the shared memory in use ends.
    """

    blocks: int
    warps: int
    stages: int
    group: int
    panel_stripes: int
    end_bytes: int

    def macros(self, batch: int, dtype: torch.dtype) -> Macros:
        """What the compiler must know about the product with `batch` vectors of a type."""
        numbers = ("BATCH", batch), ("TYPE", TYPES[dtype])
        return (*numbers, ("THREADS", self.warps * LANES), ("STAGES", self.stages))


def most_vectors(dtype: torch.dtype) -> int:
    """Vectors of a type that one launch takes."""
    return min(_LAUNCH_VECTORS, _MOST_SIDES // _PARTS[dtype])


@functools.lru_cache(maxsize=1024)
def lossless_plan(gpu: Gpu, tiles: int, stripes: int, batch: int, dtype: torch.dtype) -> LosslessPlan | None:
    """Divide the product of matrices with `tiles` tiles in all; `None` if it does not fit in shared memory."""
    blocks = min(tiles, gpu.multiprocessors)
    block_tiles = -(-tiles // blocks)
    sides = batch * _PARTS[dtype]
    most_bytes = gpu.block_bytes * _STAGES_SHARE
    choices = _STAGES if batch <= _FEW_VECTORS else _STAGES[1:]
    warps, stages = next(found for found in choices if math.prod(found) * _STRIPE_BYTES <= most_bytes)
    # Of two groups, since one is added up while warps begin the next.
    sums_bytes = 2 * 4 * TILE_ROWS * (warps * (sides + sides % 2) + batch)

    def end_bytes(group: int, panel: int) -> int:
        totals = 0 if panel == stripes else block_tiles * TILE_ROWS * batch * 4
        x_bytes = sides * (panel * STRIPE_COLUMNS * 2 + _GAP_BYTES)
        return RESERVED_BYTES + warps * stages * _STRIPE_BYTES + group * sums_bytes + x_bytes + totals

    # Warps wait for each other after a group, so that it should be large, but not at the cost of another panel.
    group = min(block_tiles, _MOST_GROUP)
    whole_turns = range(-(-stripes // warps) * warps, 0, -warps)  # of all warps
    for panel in (stripes, *(panel for panel in whole_turns if panel < stripes), *range(warps - 1, 0, -1)):
        for count in range(group, 0, -1):
            if end_bytes(count, panel) <= gpu.block_bytes:
                return LosslessPlan(blocks, warps, stages, count, panel, end_bytes(count, panel))
    return None


def _struct(part: LosslessPart, tile_begin: int = 0, y_begin: int = 0) -> LosslessMatrixStruct:
    return LosslessMatrixStruct(
        part.data.data_ptr(),
        part.bases.data_ptr(),
        part.patch_begins.data_ptr(),
        part.patches.data_ptr(),
        part.rows,
        part.stripes,
        tile_begin,
        y_begin,
    )


def _decode(part: LosslessPart, out: Tensor, ids: Tensor | None, device: torch.device) -> None:
    """Decode all rows, or some by their numbers, to contiguous memory."""
    struct = LosslessDecodeStruct(_struct(part), None if ids is None else ids.data_ptr(), out.data_ptr(), part.columns)
    kernel = function("lossless_decode.cu", "decode_lossless", device, decode_macros(out.dtype), 0)
    kernel.launch([struct], part.tiles if ids is None else len(ids), _DECODE_THREADS, overlap=False)


def decode_macros(dtype: torch.dtype) -> Macros:
    """What the compiler must know to decode to a type."""
    return (("TYPE", TYPES[dtype]), ("THREADS", _DECODE_THREADS))


class _Product:
    """The product of some matrices with a fixed number of vectors of one type."""

    def __init__(
        self,
        parts: Sequence[LosslessPart],
        plan: LosslessPlan,
        batch: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self._overlaps = gpu_of(device).tuning.overlaps
        self._plan = plan
        macros = plan.macros(batch, dtype)
        self._function = function("lossless_product.cu", "multiply_lossless", device, macros, plan.end_bytes)
        structs = []
        y_begin = tile_begin = 0
        for part in parts:
            structs.append(_struct(part, tile_begin, y_begin))
            y_begin += part.rows
            tile_begin += part.tiles
        self._struct = LosslessProductStruct(
            matrices=tuple(structs),
            count=len(parts),
            tiles=tile_begin,
            columns=padded_columns(parts[0].columns),
            y_stride=y_begin,
            stripes=parts[0].stripes,
            panel_stripes=plan.panel_stripes,
            group=plan.group,
        )

    def __call__(self, x: Tensor, y: Tensor) -> None:
        """Multiply `x` into `y`. Both are contiguous and of the product's type; rows of `x` are padded."""
        self._struct.x = x.data_ptr()
        self._struct.y = y.data_ptr()
        self._function.launch([self._struct], self._plan.blocks, self._plan.warps * LANES, self._overlaps)


class LosslessCudaMatrix(PartedMatrix[LosslessPart, _Product]):
    """Lossless bfloat16 matrices, one below the other, on one GPU.

    Args:
        parts: matrices with the same number of columns.
        device: the GPU.
    """

    def multiply(self, x: Tensor) -> Tensor:
        """Multiply: (n, in_features) -> (n, out_features) in the type of x, which is float32, bfloat16 or float16.

        For more than a few vectors, the matrix is first decoded to memory in the type of x.
        """
        batch = x.shape[0]
        launches = self._launches(batch, x.dtype)
        if launches == 0:
            return x @ self.dequantize(x.dtype).T
        y = x.new_empty(batch, self.shape[0])
        for launch in range(launches):
            begin, end = (batch * i // launches for i in (launch, launch + 1))
            self.product(end - begin, x.dtype)(aligned(x[begin:end]), y[begin:end])
        return y

    def _launches(self, batch: int, dtype: torch.dtype) -> int:
        """Launches that a product takes; 0 if the matrix is decoded to memory for it."""
        if not 0 < batch <= MAX_BATCH:
            return 0
        choices = range(-(-batch // most_vectors(dtype)), _MOST_LAUNCHES + 1)
        return next((count for count in choices if self._plan(-(-batch // count), dtype) is not None), 0)

    def _plan(self, batch: int, dtype: torch.dtype) -> LosslessPlan | None:
        tiles = sum(part.tiles for part in self.parts)
        return lossless_plan(gpu_of(self.device), tiles, self.parts[0].stripes, batch, dtype)

    def _make_product(self, batch: int, dtype: torch.dtype) -> _Product:
        plan = self._plan(batch, dtype)
        if plan is None:
            raise ValueError(f"{batch} vectors of {self.shape[1]} columns do not fit in the shared memory of a block")
        return _Product(self.parts, plan, batch, dtype, self.device)

    def _decode(self, part: LosslessPart, out: Tensor, ids: Tensor | None) -> None:
        _decode(part, out, ids, self.device)
