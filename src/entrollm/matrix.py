"""Matrices that stay coded: where Python meets the native product."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from entrollm import _core
from entrollm.codec.words import weights_of
from entrollm.errors import CorruptStreamError, FormatError
from entrollm.format import layout
from entrollm.format.entry import split_entries
from entrollm.format.flat import FlatCode
from entrollm.format.grid import GridKind
from entrollm.format.group_scales import GroupedKind, GroupScales
from entrollm.format.log_scales import decode_scales, zero_offsets
from entrollm.format.lossless import LosslessKind
from entrollm.format.reader import CompressedModel
from entrollm.format.spec import Kind, TensorSpec

_NO_STREAM = np.zeros(_core.SLACK_BYTES, np.uint8)
_NO_SIZES = np.zeros(0, np.uint16)
_ONE = np.ones(1, np.float32)


class _Scales(NamedTuple):
    scale: NDArray[np.float32]
    offset: NDArray[np.float32] | None
    column_scale: NDArray[np.float32] | None
    groups: GroupScales | None


@dataclass(frozen=True)
class CodedMatrix:
    """A matrix that is read straight from its coded bytes, or in the flat form that memory holds.

    Attributes:
        name: the tensor's name.
        spec: what it is.
        stored_bytes: all its bytes in the file, without its share of the header.
        native: what multiplies and decodes it, coded or flat, in memory or in the file; where there are groups, of the
            integers alone.
        scale: float32, shape (1,) or (rows,); of no use where there are groups. That of half steps with a trellis.
        offset: float32, the shape of scale; None for none.
        column_scale: float32, shape (columns,); None for none.
        groups: its group scales; None if absent.
        grouped: what multiplies with group scales; None if absent.
        lossless: what multiplies with lossless words; None if the matrix has none.
    """

    name: str
    spec: TensorSpec
    stored_bytes: int
    native: _core.CodedMatrix | _core.FlatMatrix
    scale: NDArray[np.float32]
    offset: NDArray[np.float32] | None
    column_scale: NDArray[np.float32] | None
    groups: GroupScales | None = None
    grouped: _core.GroupedMatrix | None = None
    lossless: _core.LosslessMatrix | None = None

    @property
    def can_be_flat(self) -> bool:
        """Whether memory can hold it in the flat form, which fp8 values and odd sizes of scale groups do not have."""
        return self.grouped is None or self.grouped.can_flatten

    @property
    def is_flat(self) -> bool:
        """Whether memory holds it in the flat form, which needs no bytes of the file but the low ones."""
        if isinstance(self.native, _core.FlatMatrix):
            return not self.native.is_in_place
        return self.grouped is not None and self.grouped.is_flat

    @property
    def flat_bytes(self) -> int | None:
        """Memory that the flat form takes besides group scales and low bytes; None while it is read from the file."""
        if isinstance(self.native, _core.FlatMatrix) and self.is_flat:
            return self.native.size_bytes
        return self.grouped.size_bytes if self.grouped is not None and self.grouped.is_flat else None

    @property
    def flat_rows(self) -> dict[int, int]:
        """How many rows have flat fields of each width, by bits; empty while coded."""
        if isinstance(self.native, _core.FlatMatrix):
            return self.native.rows_by_bits
        return {self.grouped.bits: self.spec.rows} if self.grouped is not None and self.grouped.is_flat else {}

    def to_flat(self, pool: _core.ThreadPool) -> CodedMatrix:
        """The same matrix in the flat form in memory: the same integers, the same products bit for bit.

        Raises:
            CorruptStreamError: a block does not decode.
            MemoryError: the memory does not suffice.
            ValueError: it has no flat form.
        """
        if not self.can_be_flat:
            raise ValueError(f"{self.name}: matrices with fp8 values or an odd size of scale groups have no flat form")
        if self.is_flat:
            return self
        try:
            native = self.native
            if isinstance(native, _core.FlatMatrix):
                flat = native.copy(pool)
            elif self.groups is not None:
                grouped = _open_groups(native, self.groups)
                grouped.flatten(pool)
                return replace(self, grouped=grouped)
            else:
                flat = _core.FlatMatrix(native, pool)
            lossless = None if self.lossless is None else self.lossless.with_symbols(flat)
            return replace(self, native=flat, lossless=lossless)
        except _core.CorruptBlockError as error:
            raise self.corrupt(error) from None

    def symbols(self, begin: int, end: int, pool: _core.ThreadPool) -> NDArray[np.uint8]:
        """Decode rows [begin, end), with a trellis to half steps: uint8 (end - begin, columns).

        Raises:
            CorruptStreamError: a block does not decode.
        """
        try:
            return self.native.decode(begin, end, pool)
        except _core.CorruptBlockError as error:
            raise self.corrupt(error) from None

    def dequantize(self, rows: NDArray[np.int64], pool: _core.ThreadPool) -> NDArray[np.float32]:
        """Decode and dequantize some rows: float32 (len(rows), columns).

        Raises:
            CorruptStreamError: a block does not decode.
        """
        try:
            if self.lossless is not None:
                return self.lossless.dequantize(rows, pool)
            values = self.native.dequantize(rows, pool)
        except _core.CorruptBlockError as error:
            raise self.corrupt(error) from None
        return values if self.groups is None else self.groups.apply(values, rows)

    def original(self, begin: int, end: int, pool: _core.ThreadPool) -> NDArray[Any]:
        """Decode rows [begin, end) of a lossless matrix bit for bit: (end - begin, columns) in the original type.

        Raises:
            CorruptStreamError: a block does not decode.
        """
        assert self.lossless is not None and isinstance(self.spec.kind, LosslessKind)
        try:
            return weights_of(self.spec.kind, self.spec.dtype, self.lossless.words(begin, end, pool))
        except _core.CorruptBlockError as error:
            raise self.corrupt(error) from None

    def corrupt(self, error: Exception) -> CorruptStreamError:
        """The error for a block that does not decode."""
        return CorruptStreamError(f"{self.name}: {error}; the file is damaged, compress or fetch it again")


def open_matrix(name: str, spec: TensorSpec, arrays: Mapping[str, NDArray[Any]]) -> CodedMatrix:
    """Open a matrix over its stored entries, checking that streams, blocks and code fit together.

    Args:
        name: the tensor's name, for errors.
        spec: what it is.
        arrays: its stored entries by suffix; the streams are read in place, the others are copied.
    Raises:
        FormatError: the entries do not match the spec.
    """
    stored_bytes = sum(array.nbytes for array in arrays.values())
    arrays = split_entries(name, spec, arrays)
    _check_entries(name, spec.kind, arrays)
    if isinstance(spec.kind, GroupedKind):
        scales = _Scales(_ONE, None, None, _read_groups(name, spec, spec.kind, arrays))
    elif isinstance(spec.kind, LosslessKind):
        scales = _Scales(_ONE, None, None, None)
    else:
        scales = _read_grid(name, spec.kind, arrays)
    grouped = lossless = None
    try:
        native = _open_native(spec, arrays, scales)
        if isinstance(spec.kind, LosslessKind):
            lossless = _core.LosslessMatrix(native, arrays.get(layout.LOW), spec.kind.type)
    except ValueError as error:
        raise FormatError(f"{name}: {error}; the file is damaged or was not written by EntroLLM") from None
    if scales.groups is not None and isinstance(native, _core.CodedMatrix):
        grouped = _open_groups(native, scales.groups)
    return CodedMatrix(
        name,
        spec,
        stored_bytes,
        native,
        scales.scale,
        scales.offset,
        scales.column_scale,
        scales.groups,
        grouped,
        lossless,
    )


def _open_native(
    spec: TensorSpec, arrays: Mapping[str, NDArray[Any]], scales: _Scales
) -> _core.CodedMatrix | _core.FlatMatrix:
    dense, sparse = (arrays.get(suffix, _NO_STREAM) for suffix in layout.STREAMS)
    sizes = _aligned(arrays.get(layout.SPARSE_SIZES, _NO_SIZES))
    if isinstance(spec.code, FlatCode):
        shape, windows = (spec.rows, spec.columns), _aligned(arrays.get(layout.SEGMENTS, _NO_SIZES))
        if sparse.ctypes.data % windows.itemsize:
            sparse = _aligned(sparse)
        return _core.FlatMatrix.open(
            shape,
            spec.code.segment_rows,
            windows,
            dense,
            sparse,
            sizes,
            scales.scale,
            scales.offset,
            scales.column_scale,
            spec.has_trellis,
        )
    return _core.CodedMatrix(
        spec.code.program(),
        spec.code.low_bits,
        _core.Geometry(spec.rows, spec.columns, spec.blocks.rows, spec.blocks.columns),
        dense,
        sparse,
        sizes,
        scales.scale,
        scales.offset,
        scales.column_scale,
        spec.has_trellis,
    )


def matrix_of(model: CompressedModel, name: str) -> CodedMatrix:
    """Open one matrix of a folder, checking that its streams, blocks and code fit together.

    Raises:
        KeyError: no matrix has this name.
        FormatError: the stored entries do not match the spec.
    """
    return open_matrix(name, model.specs[name], model.entries(name))


def code_of(model: CompressedModel, name: str) -> CodedMatrix:
    """Open one matrix so that it decodes to the symbols of its code, and not, with a trellis, to half steps.

    Raises:
        KeyError: no matrix has this name.
        FormatError: the stored entries do not match the spec.
    """
    spec = model.specs[name]
    if isinstance(spec.kind, GridKind) and spec.kind.trellis:
        spec = replace(spec, kind=replace(spec.kind, trellis=False))
    return open_matrix(name, spec, model.entries(name))


class Product:
    """A product with several matrices at once, prepared once for many calls.

    Activations are rounded to 16 bits of each row's largest magnitude, and sums are exact integers. With group scales,
    sums over a group are exact, those over groups are in float32 (in double precision for fp8 values and for odd group
    sizes), and weights are not rounded to half precision first. With lossless words, activations are not rounded, and
    sums are in float32.

    Args:
        matrices: of as many columns each; one at least.
    """

    def __init__(self, matrices: Sequence[CodedMatrix]) -> None:
        self._matrices = tuple(matrices)
        self._native = [matrix.native for matrix in matrices]
        grouped = [matrix.grouped for matrix in matrices if matrix.grouped is not None]
        self._grouped = grouped if len(grouped) == len(matrices) else []
        lossless = [matrix.lossless for matrix in matrices if matrix.lossless is not None]
        self._lossless = lossless if len(lossless) == len(matrices) else []
        self._is_mixed = bool(grouped or lossless) and not (self._grouped or self._lossless)
        self._is_mixed |= any(_column_order(matrix) is not None for matrix in matrices)

    def native(self, bias: NDArray[np.float32] | None) -> _core.JoinedProduct | None:
        """The product for native layers, which add `bias` to it; None where it takes more than one native call."""
        if self._is_mixed:
            return None
        names = ", ".join(matrix.name for matrix in self._matrices)
        return _core.JoinedProduct(names, self._grouped or self._lossless or self._native, bias)

    def __call__(self, x: NDArray[np.float32], pool: _core.ThreadPool) -> NDArray[np.float32]:
        """Multiply: float32 (n, columns) -> float32 (n, sum of rows), side by side.

        Raises:
            CorruptStreamError: a block does not decode.
        """
        try:
            if self._is_mixed:
                return np.concatenate([_multiply_one(matrix, x, pool) for matrix in self._matrices], axis=1)
            x = np.ascontiguousarray(x)
            if self._grouped:
                return _core.multiply_grouped(self._grouped, x, pool)
            if self._lossless:
                return _core.multiply_lossless(self._lossless, x, pool)
            return _core.multiply(self._native, x, pool)
        except _core.CorruptBlockError as error:
            names = ", ".join(matrix.name for matrix in self._matrices)
            raise CorruptStreamError(f"{names}: {error}; the file is damaged, compress or fetch it again") from None


def multiply(matrices: Sequence[CodedMatrix], x: NDArray[np.float32], pool: _core.ThreadPool) -> NDArray[np.float32]:
    """Multiply once; see Product.

    Raises:
        CorruptStreamError: a block does not decode.
    """
    return Product(matrices)(x, pool)


def _multiply_one(matrix: CodedMatrix, x: NDArray[np.float32], pool: _core.ThreadPool) -> NDArray[np.float32]:
    if matrix.lossless is not None:
        return _core.multiply_lossless([matrix.lossless], np.ascontiguousarray(x), pool)
    if matrix.grouped is None:
        return _core.multiply([matrix.native], np.ascontiguousarray(x), pool)
    order = _column_order(matrix)
    return _core.multiply_grouped([matrix.grouped], np.ascontiguousarray(x if order is None else x[:, order]), pool)


def _column_order(matrix: CodedMatrix) -> NDArray[Any] | None:
    return None if matrix.groups is None else matrix.groups.arrays.get("column_order")


def _open_groups(native: _core.CodedMatrix, groups: GroupScales) -> _core.GroupedMatrix:
    form, arrays, types = groups.form, dict(groups.arrays), dict(groups.form.types)
    ratio, rest = divmod(form.super_size or form.size, form.size)
    if rest:
        # Groups that straddle super groups: the native product takes one scale a group.
        for part in ("scale", "minimum"):
            if f"super_{part}" in types:
                del arrays[f"super_{part}"], types[f"super_{part}"]
                arrays[f"group_{part}"], types[f"group_{part}"] = groups.nested(part), "F32"
        ratio = 1
    stored = {
        name: (np.ascontiguousarray(array).reshape(-1).view(np.uint8), types[name])
        for name, array in arrays.items()
        if name != "column_order"
    }
    factor = 1.0 if form.factor is None else form.factor
    return _core.GroupedMatrix(native, form.size, ratio, stored, float(form.zero or 0), factor, groups.values)


def _check_entries(name: str, kind: Kind, arrays: Mapping[str, NDArray[Any]]) -> None:
    """Check that the stored arrays are those that the kind declares.

    Raises:
        FormatError: one is missing or not declared.
    """
    expected = tuple("." + entry for entry in kind.entry_names)
    stray = [s for s in arrays if s in (layout.LOW, *layout.GROUP_SUFFIXES) and s not in expected]
    if not isinstance(kind, GridKind):
        stray += [s for s in (layout.SCALE, layout.OFFSET, layout.COLUMN_SCALE) if s in arrays]
    missing = [suffix for suffix in expected if suffix not in arrays]
    if missing:
        raise FormatError(f"{name}: it lacks {missing[0][1:]}, which its spec declares")
    if stray:
        raise FormatError(f"{name}: it has {stray[0][1:]}, which its spec does not declare")


def _read_groups(name: str, spec: TensorSpec, kind: GroupedKind, arrays: Mapping[str, NDArray[Any]]) -> GroupScales:
    """The group scales of a matrix, inflated and checked.

    Raises:
        FormatError: an array is malformed, or holds what no weight can be made of.
    """
    found = {}
    for array, count in kind.lengths(spec.rows, spec.columns).items():
        values = layout.inflate_array(f"{name}.{array}", arrays["." + array], kind.types[array], count)
        if values.dtype.kind not in "ui" and not np.isfinite(values.astype(np.float32)).all():
            raise FormatError(f"{name}: its {array} has a value that is not finite")
        found[array] = values if array == "column_order" else values.reshape(spec.rows, -1)
    order = found.get("column_order")
    if order is not None and not np.array_equal(np.sort(order), np.arange(spec.columns, dtype=np.uint32)):
        raise FormatError(f"{name}: its column_order does not name every column once")
    return GroupScales(kind, found)


def _read_grid(name: str, kind: GridKind, arrays: Mapping[str, NDArray[Any]]) -> _Scales:
    """The scales of rows and columns; finite, in aligned memory.

    Raises:
        FormatError: an array is missing, stored twice, or has a value that is not finite.
    """
    scale = _stored_scales(name, "scale", kind.scale, kind, arrays)
    if scale is None:
        raise FormatError(f"{name}: neither its spec nor the entry {name + layout.SCALE!r} gives its scale")
    column_scale = _stored_scales(name, "column_scale", None, kind, arrays)
    if kind.zero is None:
        return _Scales(scale, _stored_scales(name, "offset", kind.offset, kind, arrays), column_scale, None)
    if layout.OFFSET in arrays:
        raise FormatError(f"{name}: it has a zero symbol and stored offsets too")
    offset = zero_offsets(scale, kind.zero)
    if not np.isfinite(offset).all():
        raise FormatError(f"{name}: its zero gives an offset that is not finite")
    return _Scales(scale, offset, column_scale, None)


def _stored_scales(
    name: str, which: str, value: float | None, kind: GridKind, arrays: Mapping[str, NDArray[Any]]
) -> NDArray[np.float32] | None:
    """One array of scales: the value of the spec, or what is stored; None if absent."""
    stored = arrays.get(f".{which}")
    form = kind.stored.get(which)
    if stored is not None and isinstance(form, int):
        base = 1.0 if which == "column_scale" else value
        if base is None:
            raise FormatError(f"{name}: its {which} is stored as codes, and the spec has no {which} that they multiply")
        found = decode_scales(stored, form, base)
    elif stored is None:
        return None if value is None else np.array([value], np.float32)
    elif value is not None:
        raise FormatError(f"{name}: its {which} is both in the spec and stored")
    else:
        found = stored.astype(np.float32)  # a copy in aligned memory; safetensors only aligns what it happens to
    if not np.isfinite(found).all():
        raise FormatError(f"{name}: its {which} has a value that is not finite")
    return found


def _aligned(array: NDArray[Any]) -> NDArray[Any]:
    """A copy in aligned memory; safetensors only aligns what it happens to."""
    return np.array(array)
