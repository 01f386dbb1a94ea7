"""Matrices with group scales on a GPU: integers of fixed width, with scales as they are stored.

They multiply as they are unpacked, for a few vectors. For more, they are decoded to memory, rounded as the format says.
"""

from __future__ import annotations

import ctypes
import functools
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from entrollm.format.group_scales import GroupedKind, GroupScales
from entrollm.matrix import CodedMatrix
from entrollm.threads import start_pool
from entrollm.torch.cuda.compile import Macros
from entrollm.torch.cuda.gpu import RESERVED_BYTES, gpu_of
from entrollm.torch.cuda.launch import TYPES, Function, aligned, function
from entrollm.torch.cuda.layout import padded_columns
from entrollm.torch.cuda.tuning import Tuning

UNIT_COLUMNS = 32
"""Columns of a unit, which a lane unpacks at a time."""
MAX_BATCH = 8
"""Vectors that one product takes; for more, the matrix is decoded to memory."""
DECODE_THREADS = 256

_QUADS = 8  # of a unit
_STEP_COLUMNS = 32 * UNIT_COLUMNS
_NUMBERS = {"F32": 1, "F16": 2, "BF16": 3, "U8": 4, "I8": 5}
_VALUES = {None: 0, "F8_E4M3": 1, "F8_E5M2": 2}
_ARRAYS = ("group_scale", "group_zero", "group_minimum", "super_scale", "super_minimum")
_WIDTHS = (8, 4, 2, 1)


class GroupedMatrixStruct(ctypes.Structure):
    """`Matrix` of groups.cuh."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("eights", "fours", "twos", "ones")),
        *((name, ctypes.c_void_p) for name in _ARRAYS),
        *((name, ctypes.c_int) for name in ("rows", "columns", "units", "groups", "super_groups")),
        ("constant_zero", ctypes.c_float),
        ("factor", ctypes.c_float),
    )


class VectorsStruct(ctypes.Structure):
    """`Vectors` of grouped_work.cuh."""

    _fields_ = (
        ("x", ctypes.c_void_p),
        ("y", ctypes.c_void_p),
        ("columns", ctypes.c_int),
        ("y_stride", ctypes.c_int),
        ("panel_steps", ctypes.c_int),
    )


class GroupedProductStruct(ctypes.Structure):
    """`Launch` of grouped_product.cu."""

    _fields_ = (("matrix", GroupedMatrixStruct), ("vectors", VectorsStruct))


class GroupedDecodeStruct(ctypes.Structure):
    """`Launch` of grouped_decode.cu."""

    _fields_ = (("matrix", GroupedMatrixStruct), ("rows", ctypes.c_void_p), ("out", ctypes.c_void_p))


def pack(symbols: Tensor) -> dict[int, Tensor]:
    """Write integers in fields of the fewest bits, from 1 to 8, that hold all of them.

    Args:
        symbols: uint8, shape (rows, columns).
    Returns:
        By the width of a part, 8, 4, 2 or 1 bits, which add up to that number: uint8, shape (rows, units, 4 * width).
    """
    rows, columns = symbols.shape
    bits = max(1, int(symbols.max()).bit_length())
    quads = torch.nn.functional.pad(symbols, (0, -columns % UNIT_COLUMNS)).reshape(rows, -1, _QUADS, 4)
    if bits == 8:
        return {8: quads.flatten(2)}
    packed = {}
    for width in (width for width in _WIDTHS if bits & width):
        # The lowest bits are in the widest part.
        below = sum(wider for wider in _WIDTHS if bits & wider and wider > width)
        fields = quads >> below & (1 << width) - 1
        words = fields.reshape(rows, -1, width, 8 // width, 4)
        shifts = torch.arange(0, 8, width, dtype=torch.uint8, device=symbols.device)[:, None]
        packed[width] = (words << shifts).sum(3, dtype=torch.uint8).flatten(2)
    return packed


@dataclass(frozen=True)
class GroupedFields:
    """A matrix with group scales in a GPU's memory, with its columns in stored order.

    Attributes:
        name: the matrix's name, for errors.
        kind: its form.
        rows, columns: its shape.
        fields: its integers, from `pack`.
        arrays: its scales, by a name of `kind.types`, as bytes.
        order: int64, shape (columns,), the original column of each stored one; `None` if they are the same.
        has_nan: whether some weights are NaN, which products do not make.
    """

    name: str
    kind: GroupedKind
    rows: int
    columns: int
    fields: dict[int, Tensor]
    arrays: dict[str, Tensor]
    order: Tensor | None
    has_nan: bool = False

    @classmethod
    def of(cls, name: str, symbols: Tensor, groups: GroupScales) -> GroupedFields:
        """Pack a matrix on the device where its symbols are: uint8, shape (rows, columns)."""
        device = symbols.device
        arrays = {
            array: torch.from_numpy(np.array(values).reshape(-1).view(np.uint8)).to(device)
            for array, values in groups.arrays.items()
            if array != "column_order"
        }
        order = groups.arrays.get("column_order")
        return cls(
            name,
            groups.form,
            symbols.shape[0],
            symbols.shape[1],
            pack(symbols),
            arrays,
            None if order is None else torch.from_numpy(order.astype(np.int64)).to(device),
            groups.form.values == "F8_E4M3" and bool(((symbols & 0x7F) == 0x7F).any()),
        )

    @property
    def size_bytes(self) -> int:
        """GPU memory in use."""
        order = 0 if self.order is None else self.order.numel() * 8
        return order + sum(tensor.numel() for tensor in (*self.fields.values(), *self.arrays.values()))

    @property
    def group_columns(self) -> int:
        """Columns of a group as kernels count them: for one group in each row, any number of units that is enough."""
        kind = self.kind
        return kind.size if kind.size < self.columns else -(-kind.size // UNIT_COLUMNS) * UNIT_COLUMNS

    @property
    def is_multipliable(self) -> bool:
        """Whether groups begin where the lanes of a product can begin another sum, and all values are numbers."""
        return self.group_columns % 8 == 0 and not self.has_nan

    @property
    def parts(self) -> int:
        """Groups of a unit."""
        return next(parts for parts in (1, 2, 4) if self.group_columns * parts % UNIT_COLUMNS == 0)

    def panel(self, room_bytes: int, batch: int) -> tuple[int, int]:
        """Steps of a warp whose activations are in shared memory at a time, and the bytes that these take."""
        steps = -(-self.columns // _STEP_COLUMNS)
        # Activations and their sums in each group of a unit.
        step_bytes = (_STEP_COLUMNS + 32 * self.parts) * 4 * batch
        held = min(steps, room_bytes // step_bytes)
        return held, held * step_bytes

    def struct(self) -> GroupedMatrixStruct:
        """The matrix as an argument of kernels."""
        kind = self.kind
        found = GroupedMatrixStruct(
            rows=self.rows,
            columns=self.columns,
            units=-(-self.columns // UNIT_COLUMNS),
            groups=-(-self.columns // kind.size),
            super_groups=-(-self.columns // (kind.super_size or self.columns)),
            constant_zero=float(kind.zero or 0),
            factor=1.0 if kind.factor is None else kind.factor,
        )
        for width, name in zip(_WIDTHS, ("eights", "fours", "twos", "ones"), strict=True):
            setattr(found, name, self.fields[width].data_ptr() if width in self.fields else None)
        for name in _ARRAYS:
            setattr(found, name, self.arrays[name].data_ptr() if name in self.arrays else None)
        return found

    def macros(self) -> Macros:
        """What groups.cuh must know."""
        kind = self.kind
        return (
            ("BITS", sum(self.fields)),
            ("SIZE", self.group_columns),
            ("SUPER_SIZE", kind.super_size or self.group_columns),
            *((name.removeprefix("group_").upper(), _NUMBERS.get(kind.types.get(name, ""), 0)) for name in _ARRAYS),
            ("CONSTANT_ZERO", int(kind.zero is not None)),
            ("VALUES", _VALUES[kind.values]),
        )

    def decode_macros(self, dtype: int) -> Macros:
        """What the compiler must know to decode to a type, by its number in TYPES."""
        kind = self.kind
        arithmetic = ("ARITHMETIC", _NUMBERS[kind.arithmetic])
        factor = ("FACTOR", int(kind.factor is not None))
        return (("TYPE", dtype), ("THREADS", DECODE_THREADS), arithmetic, factor, *self.macros())

    def product_macros(self, tuning: Tuning, batch: int, dtype: int) -> Macros:
        """What the compiler must know to multiply with `batch` vectors of a type, by its number in TYPES."""
        threads = tuning.grouped_threads // (1 if batch <= 2 else 2)
        warps = tuning.multiprocessors * threads // 32

        def cost(rows: int) -> float:
            # Turns of the warps; with one row, activations are read too often.
            return -(-self.rows // (rows * warps)) * rows * (1.15 if rows == 1 else 1)

        bits = sum(self.fields)
        most_words = 12 if batch <= 2 else 16  # that a lane has at a time
        rows = min((count for count in (2, 1) if count * bits <= most_words), key=cost)
        return (
            ("BATCH", batch),
            ("TYPE", dtype),
            ("THREADS", threads),
            ("ROWS", rows),
            ("AHEAD", 2 if rows * bits <= 4 else 1),
            *self.macros(),
        )


class GroupedCudaMatrix:
    """A matrix with group scales on one GPU, which never holds it decoded.

    Args:
        matrix: a coded matrix with group scales.
        device: the GPU.
    Raises:
        UnsupportedError: the kernels cannot be compiled.
    """

    def __init__(self, matrix: CodedMatrix, device: torch.device) -> None:
        if device.index is None:
            device = torch.device("cuda", torch.cuda.current_device())
        assert matrix.groups is not None
        symbols = torch.from_numpy(matrix.symbols(0, matrix.spec.rows, start_pool()))
        self._setup(GroupedFields.of(matrix.name, symbols.to(device), matrix.groups), device)

    @classmethod
    def from_fields(cls, part: GroupedFields, device: torch.device) -> GroupedCudaMatrix:
        """Make one of a matrix that is packed already."""
        matrix = cls.__new__(cls)
        matrix._setup(part, device)
        return matrix

    def _setup(self, part: GroupedFields, device: torch.device) -> None:
        self.part = part
        self.device = device
        self.shape = (part.rows, part.columns)
        self._products: dict[tuple[int, torch.dtype], _Product] = {}

    @property
    def size_bytes(self) -> int:
        """GPU memory in use."""
        return self.part.size_bytes

    def multiply(self, x: Tensor) -> Tensor:
        """Multiply: (n, in_features) -> (n, out_features) in the type of x, which is float32, bfloat16 or float16."""
        order = self.part.order
        x = x if order is None else x[:, order]
        if x.shape[0] > MAX_BATCH or not self.part.is_multipliable:
            return x @ self._decoded(x.dtype, None).T
        x = aligned(x)
        y = x.new_empty(x.shape[0], self.shape[0])
        if len(x):
            self.product(len(x), x.dtype)(x, y)
        return y

    def product(self, batch: int, dtype: torch.dtype) -> _Product:
        """The product with `batch` vectors of a type, ready to launch."""
        key = batch, dtype
        if key not in self._products:
            self._products[key] = _Product(self.part, batch, dtype, self.device)
        return self._products[key]

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """Decode all weights: (out_features, in_features)."""
        return self._in_order(self._decoded(dtype, None))

    def rows(self, ids: Tensor) -> Tensor:
        """Look up rows: integers (n,) -> float32 (n, in_features); rows outside of the matrix are NaN."""
        inside = (ids >= 0) & (ids < self.shape[0])
        ids = ids.clamp(0, self.shape[0] - 1).to(torch.int64).contiguous()
        return self._in_order(self._decoded(torch.float32, ids)).masked_fill_(~inside[:, None], torch.nan)

    def _in_order(self, stored: Tensor) -> Tensor:
        order = self.part.order
        return stored if order is None else torch.empty_like(stored).index_copy_(1, order, stored)

    def _decoded(self, dtype: torch.dtype, ids: Tensor | None) -> Tensor:
        """Decode all rows, or some, with columns in stored order."""
        items = self.shape[0] if ids is None else len(ids)
        out = torch.empty(items, self.shape[1], dtype=dtype, device=self.device)
        if items:
            struct = GroupedDecodeStruct(self._struct, None if ids is None else ids.data_ptr(), out.data_ptr())
            self._decoder(dtype).launch([struct], items, DECODE_THREADS, False)
        return out

    @functools.cached_property
    def _struct(self) -> GroupedMatrixStruct:
        return self.part.struct()

    def _decoder(self, dtype: torch.dtype) -> Function:
        return function("grouped_decode.cu", "decode_grouped", self.device, self.part.decode_macros(TYPES[dtype]), 0)


class _Product:
    """A product with a fixed number of vectors of one type."""

    def __init__(self, part: GroupedFields, batch: int, dtype: torch.dtype, device: torch.device) -> None:
        gpu = gpu_of(device)
        self._overlaps = gpu.tuning.overlaps
        macros = part.product_macros(gpu.tuning, batch, TYPES[dtype])
        values = dict(macros)
        self._threads = values["THREADS"]
        self._grid = min(gpu.multiprocessors, -(-part.rows // values["ROWS"]))
        panel, panel_bytes = part.panel(gpu.block_bytes - RESERVED_BYTES, batch)
        end_bytes = RESERVED_BYTES + panel_bytes
        self._function = function("grouped_product.cu", "multiply_grouped", device, macros, end_bytes)
        columns = padded_columns(part.columns)
        vectors = VectorsStruct(columns=columns, y_stride=part.rows, panel_steps=panel)
        self._struct = GroupedProductStruct(part.struct(), vectors)

    def __call__(self, x: Tensor, y: Tensor) -> None:
        """Multiply `x` into `y`. Both are contiguous and of the product's type; rows of `x` are padded."""
        self._struct.vectors.x = x.data_ptr()
        self._struct.vectors.y = y.data_ptr()
        self._function.launch([self._struct], self._grid, self._threads, self._overlaps)
