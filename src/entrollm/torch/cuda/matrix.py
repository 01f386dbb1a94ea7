"""Coded matrices in GPU memory: multiply with them, look rows up, decode them whole."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from entrollm import _core
from entrollm.errors import UnsupportedError
from entrollm.matrix import CodedMatrix
from entrollm.threads import default_threads
from entrollm.torch.cuda import compile as kernels
from entrollm.torch.cuda.launch import (
    MAX_MATRICES,
    TYPES,
    DecodeStruct,
    Function,
    MatrixStruct,
    ProductStruct,
    divisor,
    shared_bytes,
    shared_bytes_of_half,
)
from entrollm.torch.cuda.plan import TABLE_END, Plan, chunk_limit, plan_of, slot_bytes
from entrollm.torch.cuda.shape import GROUP_COLUMNS, TILE_ROWS, Shape, choose_shape
from entrollm.torch.cuda.transcode import BATCH_WEIGHTS, Packed, look_up, pack, row_words
from entrollm.torch.cuda.triples import TripleCode, choose_triple_code

DECODE_THREADS = 512
MAX_BATCH = 8

_DECODE_SLOTS = 8
_DECODE_STATIC_BYTES = (DECODE_THREADS // 32 * GROUP_COLUMNS + _DECODE_SLOTS * 12) * TILE_ROWS + (2 << 10)
# Shared memory of a block that matrices are cut for where there is no GPU, which is Hopper's.
_HOPPER_BYTES = 227 << 10


@dataclass(frozen=True)
class DeviceMatrix:
    """One matrix on a GPU; rows lie in the order of their coded length, which makes a tile's lanes equally long.

    Attributes:
        bounds: int16, where segments begin, in groups, and where the last ends.
        places: int32, shape (rows,), the place of each row.
        column_scale: float32, a multiple of four, or None.
    """

    name: str
    shape: Shape
    code: TripleCode
    packed: Packed
    table: Tensor
    bounds: Tensor
    places: Tensor
    column_scale: Tensor | None

    @property
    def size_bytes(self) -> int:
        """Everything that stays in GPU memory."""
        tensors = [self.packed.data, self.packed.chunks, self.table, self.bounds, self.places]
        tensors += [] if self.column_scale is None else [self.column_scale]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    def struct(self, y_begin: int = 0, cta_begin: int = 0, cta_count: int = 1) -> MatrixStruct:
        """What kernels take."""
        column_scale = None if self.column_scale is None else self.column_scale.data_ptr()
        return MatrixStruct(
            self.packed.data.data_ptr(),
            self.packed.chunks.data_ptr(),
            self.table.data_ptr(),
            column_scale,
            self.bounds.data_ptr(),
            self.shape.rows,
            self.shape.tiles,
            self.shape.groups,
            divisor(self.shape.chunks),
            divisor(self.shape.segments),
            self.code.raw_bits,
            self.code.base,
            y_begin,
            cta_begin,
            divisor(cta_count),
        )


def transcode(
    name: str, symbols: Tensor, scale: Tensor, offset: Tensor | None = None, column_scale: Tensor | None = None
) -> DeviceMatrix:
    """Put a matrix into the GPU's layout.

    Args:
        symbols: uint8, shape (rows, columns), on the device.
        scale, offset: float32, shape (1,) or (rows,); no offset for 0.
        column_scale: float32, shape (columns,).
    """
    device = symbols.device
    rows, columns = symbols.shape
    code = choose_triple_code(torch.bincount(symbols.reshape(-1), minlength=256).tolist())
    order = _order(symbols, code)
    available = shared_bytes(device) if device.type == "cuda" else _HOPPER_BYTES
    padded, raw = _padded(columns), code.raw_bits > 0
    limit = chunk_limit(padded, raw, available)
    shape = choose_shape(
        name, rows, columns, code.bits, limit, lambda chunk: plan_of(1, padded, raw, chunk, available).slots
    )
    scale = scale.to(device).expand(rows)
    offset = torch.zeros_like(scale) if offset is None else offset.to(device).expand(rows)
    words = row_words(order, scale[order], offset[order])
    packed = pack(name, shape, code, words, lambda begin, end: symbols[order[begin:end]], limit)
    places = torch.empty_like(order)
    places[order] = torch.arange(rows, device=device)
    return DeviceMatrix(
        name,
        packed.shape,
        code,
        packed,
        torch.tensor(code.table().view(np.int32), device=device),
        torch.tensor(packed.shape.group_bounds(), dtype=torch.int16, device=device),
        places.to(torch.int32),
        None if column_scale is None else torch.nn.functional.pad(column_scale.to(device), (0, -columns % 4)),
    )


def _order(symbols: Tensor, code: TripleCode) -> Tensor:
    """Rows by the bits that their symbols take on average, longest first."""
    highs = torch.arange(256, device=symbols.device) - code.base >> code.raw_bits
    alone = torch.tensor(code.lengths.reshape(8, 8, 8).mean((1, 2)), dtype=torch.float32, device=symbols.device)
    lengths = alone[highs.clamp(0, 7)]
    parts = torch.split(symbols, max(1, BATCH_WEIGHTS // symbols.shape[1]))
    bits = [look_up(lengths, part.int()).sum(1) for part in parts]
    return torch.argsort(torch.cat(bits), descending=True, stable=True)


class CudaMatrix:
    """Matrices side by side on one GPU, which never holds them decoded.

    Args:
        matrices: coded matrices with the same number of columns.
        device: the GPU.
    Raises:
        UnsupportedError: the device is no GPU, is too old, or the kernels cannot be compiled.
    """

    def __init__(self, matrices: Sequence[CodedMatrix], device: torch.device) -> None:
        _check_device(device)
        if device.index is None:
            device = torch.device("cuda", torch.cuda.current_device())
        threads = _core.ThreadPool(default_threads())
        self._setup([_load(matrix, threads, device) for matrix in matrices], device)

    @classmethod
    def from_parts(cls, parts: Sequence[DeviceMatrix], device: torch.device) -> CudaMatrix:
        """Matrices that are in the layout already."""
        matrix = cls.__new__(cls)
        matrix._setup(parts, device)
        return matrix

    def _setup(self, parts: Sequence[DeviceMatrix], device: torch.device) -> None:
        if not 1 <= len(parts) <= MAX_MATRICES:
            raise ValueError(f"a product takes 1 to {MAX_MATRICES} matrices, not {len(parts)}")
        if len({part.shape.columns for part in parts}) != 1:
            raise ValueError(f"matrices of one product must have the same columns: {[p.shape.columns for p in parts]}")
        self.parts = tuple(parts)
        self.device = device
        self.shape = (sum(part.shape.rows for part in parts), parts[0].shape.columns)
        self._products: dict[tuple[int, torch.dtype], Product] = {}

    @property
    def size_bytes(self) -> int:
        """GPU memory in use."""
        return sum(part.size_bytes for part in self.parts)

    def multiply(self, x: Tensor) -> Tensor:
        """Multiply: (n, in_features) -> (n, out_features), in x's type; float32, bfloat16 or float16.

        Up to a few vectors are multiplied while decoding; for more, or where rows are so long that activations do not
        fit the shared memory, the matrix is decoded to x's type first.
        """
        step = self._largest_batch
        if x.shape[0] > MAX_BATCH or step == 0:
            return x @ self.dequantize(x.dtype).T
        y = x.new_empty(x.shape[0], self.shape[0])
        for begin in range(0, x.shape[0], step):
            part = x[begin : begin + step]
            if x.shape[1] % 4:
                part = torch.nn.functional.pad(part, (0, -x.shape[1] % 4))
            part = part.contiguous()
            if part.data_ptr() % 16:
                part = part.clone()
            self.product(len(part), x.dtype)(part, y[begin : begin + step])
        return y

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """Decode everything: (out_features, in_features)."""
        out = torch.empty(self.shape, dtype=dtype, device=self.device)
        self.dequantize_into(out)
        return out

    def dequantize_into(self, out: Tensor) -> None:
        """Decode everything to contiguous memory."""
        begin = 0
        for part in self.parts:
            _decode(part, out[begin : begin + part.shape.rows], None, self.device)
            begin += part.shape.rows

    def plan(self, batch: int) -> Plan:
        """Where the product with `batch` vectors keeps what in shared memory."""
        return _plan(self.parts, batch, self.device)

    def rows(self, ids: Tensor) -> Tensor:
        """Decode some rows of the only matrix: integers (n,) -> float32 (n, in_features).

        Rows that are not there are NaN; asking the GPU before every look-up would cost more than the look-up.
        """
        inside = (ids >= 0) & (ids < self.shape[0])
        ids = ids.clamp(0, self.shape[0] - 1).to(torch.int64)
        out = torch.empty(len(ids), self.shape[1], dtype=torch.float32, device=self.device)
        if len(ids):
            _decode(self.parts[0], out, ids.contiguous(), self.device)
        return out.masked_fill_(~inside[:, None], torch.nan)

    @functools.cached_property
    def _largest_batch(self) -> int:
        """Vectors that one launch takes; 0 for none."""
        return next((batch for batch in range(MAX_BATCH, 0, -1) if self.plan(batch).fits), 0)

    def product(self, batch: int, dtype: torch.dtype) -> Product:
        """The fused product with `batch` vectors of a type, ready to launch."""
        key = batch, dtype
        if key not in self._products:
            self._products[key] = Product(self.parts, batch, dtype, self.device)
        return self._products[key]


def _padded(columns: int) -> int:
    """Columns of vectors that kernels read four at a time."""
    return -(-columns // 4) * 4


def _plan(parts: Sequence[DeviceMatrix], batch: int, device: torch.device) -> Plan:
    columns = _padded(parts[0].shape.columns)
    raw = any(part.code.raw_bits for part in parts)
    chunk_bytes = max(part.packed.chunk_bytes for part in parts)
    if sum(part.shape.tiles for part in parts) <= 2 * _multiprocessors(device):
        # A block for each tile: the next product gets ready beside the last blocks of this one.
        half = plan_of(batch, columns, raw, chunk_bytes, shared_bytes_of_half(device), blocks=2)
        if half.slots >= max(part.shape.chunks for part in parts):
            return half
    return plan_of(batch, columns, raw, chunk_bytes, shared_bytes(device))


def _multiprocessors(device: torch.device) -> int:
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


class Product:
    """The fused product of some matrices with a fixed number of vectors of one type."""

    def __init__(self, parts: Sequence[DeviceMatrix], batch: int, dtype: torch.dtype, device: torch.device) -> None:
        plan = _plan(parts, batch, device)
        self._threads = plan.threads
        macros = (("BATCH", batch), ("TYPE", TYPES[dtype]), ("THREADS", plan.threads), ("BLOCKS", plan.blocks))
        self._function = _function("product.cu", "multiply", device, macros, plan.shared_bytes)
        structs = []
        y_begin = cta_begin = 0
        tiles = [part.shape.tiles for part in parts]
        ctas = tiles if plan.blocks > 1 else _share(parts, _multiprocessors(device))
        for part, count in zip(parts, ctas, strict=True):
            structs.append(part.struct(y_begin, cta_begin, count))
            y_begin += part.shape.rows
            cta_begin += count
        self._grid = cta_begin
        self._struct = ProductStruct(
            matrices=tuple(structs),
            count=len(parts),
            columns=_padded(parts[0].shape.columns),
            y_stride=y_begin,
            slots=divisor(plan.slots),
            slot_bytes=plan.slot_bytes,
            triple_bytes=plan.triple_bytes,
            raw_bytes=plan.raw_bytes,
            in_front=plan.in_front,
            front_slots=plan.front_slots,
            early=plan.early,
        )

    def __call__(self, x: Tensor, y: Tensor) -> None:
        """Multiply `x` into `y`; both contiguous and of the product's type, rows of `x` padded to multiples of four."""
        self._struct.x = x.data_ptr()
        self._struct.y = y.data_ptr()
        self._function.launch([self._struct], self._grid, self._threads, overlap=True)


def _share(parts: Sequence[DeviceMatrix], ctas: int) -> list[int]:
    """Multiprocessors of each matrix, by its bytes; at least one."""
    sizes = np.array([part.packed.data.numel() for part in parts], np.float64)
    edges = np.rint(sizes.cumsum() / sizes.sum() * (ctas - len(parts))).astype(int)
    return [int(count) + 1 for count in np.diff(edges, prepend=0)]


def _decode(part: DeviceMatrix, out: Tensor, ids: Tensor | None, device: torch.device) -> None:
    """Decode a matrix, or the rows `ids`, to contiguous memory."""
    slot_size = slot_bytes(part.packed.chunk_bytes)
    room = shared_bytes(device) - _DECODE_STATIC_BYTES - TABLE_END
    slots = min(_DECODE_SLOTS, room // slot_size)
    if slots < 1:
        raise UnsupportedError(f"{part.name}: a chunk of {slot_size} bytes does not fit this GPU's shared memory")
    items = part.shape.tiles if ids is None else len(ids)
    struct = DecodeStruct(
        matrix=part.struct(),
        rows=None if ids is None else ids.data_ptr(),
        places=part.places.data_ptr(),
        out=out.data_ptr(),
        items=items,
        columns=part.shape.columns,
        type=TYPES[out.dtype],
        slots=divisor(slots),
        slot_bytes=slot_size,
    )
    used = TABLE_END + slots * slot_size
    function = _function("decode.cu", "decode", device, (("THREADS", DECODE_THREADS),), used)
    function.launch([struct], min(items, _multiprocessors(device)), DECODE_THREADS, overlap=False)


@functools.cache
def _function(source: str, name: str, device: torch.device, macros: tuple[tuple[str, int], ...], used: int) -> Function:
    with torch.cuda.device(device):
        capability = torch.cuda.get_device_capability(device)
        return Function(kernels.kernel(source, name, capability, macros), device, used)


def _load(matrix: CodedMatrix, threads: _core.ThreadPool, device: torch.device) -> DeviceMatrix:
    """Decode a matrix on the CPU and pack its symbols on the GPU."""
    symbols = torch.from_numpy(matrix.symbols(0, matrix.spec.rows, threads)).to(device)
    offset = None if matrix.offset is None else torch.from_numpy(matrix.offset)
    column_scale = None if matrix.column_scale is None else torch.from_numpy(matrix.column_scale)
    return transcode(matrix.name, symbols, torch.from_numpy(matrix.scale), offset, column_scale)


def _check_device(device: torch.device) -> None:
    if device.type != "cuda" or torch.version.hip:
        raise UnsupportedError(f"the fused kernels run on NVIDIA GPUs, not on {device}")
