"""A matrix in one entry: its streams, then its small arrays, deflated; see docs/reference/format.md."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from entrollm._core import SLACK_BYTES
from entrollm.errors import FormatError
from entrollm.format import layout
from entrollm.format.blocks import block_count
from entrollm.format.grid import SCALE_ARRAYS, GridKind
from entrollm.format.spec import TensorSpec

# Whole vectors are read past the end of either stream, up to the next multiple of ALIGNMENT_BYTES.
ROOM_BYTES = 2 * SLACK_BYTES
_PACKED = (layout.DENSE, layout.SPARSE, layout.SPARSE_SIZES, *(f".{name}" for name in SCALE_ARRAYS))


def pack(spec: TensorSpec, arrays: Mapping[str, NDArray[Any]]) -> tuple[TensorSpec, dict[str, NDArray[Any]]]:
    """Join what a matrix consists of into one entry; arrays of groups stay beside it.

    Args:
        spec: its spec.
        arrays: by suffix, streams padded; empty ones do not count.
    Returns:
        the spec that tells of the parts, and the stored arrays by suffix.
    """
    arrays = {suffix: array for suffix, array in arrays.items() if array.size}
    beside = {suffix: array for suffix, array in arrays.items() if suffix not in _PACKED}
    dense = arrays.get(layout.DENSE, np.zeros(SLACK_BYTES, np.uint8))[:-SLACK_BYTES]
    sizes = arrays.get(layout.SPARSE_SIZES)
    sparse = np.zeros(0, np.uint8) if sizes is None else arrays[layout.SPARSE][: int(sizes.sum(dtype=np.int64))]
    kind = spec.kind
    if isinstance(kind, GridKind):
        if layout.SCALE in arrays and arrays[layout.SCALE].size == 1 < spec.rows:
            kind = dataclasses.replace(kind, scale=float(arrays.pop(layout.SCALE)[0]))
        if layout.OFFSET in arrays and arrays[layout.OFFSET].size == 1 < spec.rows:
            kind = dataclasses.replace(kind, offset=float(arrays.pop(layout.OFFSET)[0]))
    small = [(suffix, arrays[suffix]) for suffix in _PACKED[2:] if suffix in arrays]
    side = layout.deflate([array for _, array in small]) if small else np.zeros(0, np.uint8)
    if isinstance(kind, GridKind):
        stored: dict[str, str | int] = {}
        for suffix, array in small:
            if suffix != layout.SPARSE_SIZES:
                octave = array.dtype == np.uint8
                stored[suffix[1:]] = kind.stored[suffix[1:]] if octave else layout.entry_dtype(suffix, array)
        kind = dataclasses.replace(kind, stored=stored)
    if not (dense.size or sparse.size or side.size):
        return spec, beside
    parts = (dense.size, sparse.size, side.size)
    coded = np.concatenate([dense, sparse, side, np.zeros(_entry_bytes(parts) - sum(parts), np.uint8)])
    return dataclasses.replace(spec, kind=kind, parts=parts), {layout.CODED: coded, **beside}


def unpack(name: str, spec: TensorSpec, arrays: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
    """The arrays that `pack` joined, and those beside them; the streams are views.

    Args:
        name: the matrix, for errors.
        spec: its spec.
        arrays: its stored entries by suffix.
    Raises:
        FormatError: the entries do not match the spec.
    """
    split = unpack_with(name, spec, arrays, lambda side: side)
    return {**split[0], **split[1]}


def unpack_with(
    name: str, spec: TensorSpec, entries: Mapping[str, Any], to_host: Callable[[Any], NDArray[Any]]
) -> tuple[dict[str, Any], dict[str, NDArray[Any]]]:
    """`unpack` for arrays of any library: slices of the entries, and the small arrays, which are on the host.

    Args:
        name: the matrix, for errors.
        spec: its spec.
        entries: one-dimensional, by suffix.
        to_host: turns a slice into an array in memory.
    Raises:
        FormatError: the entries do not match the spec.
    """
    if (spec.parts is None) != (layout.CODED not in entries):
        raise FormatError(f"{name}: its spec and its entries do not agree on whether it is one entry")
    if spec.parts is None:
        return dict(entries), {}
    coded = entries[layout.CODED]
    dense, sparse, side = spec.parts
    size = len(coded)
    expected = _entry_bytes(spec.parts)
    if size != expected:
        raise FormatError(f"{name}: the entry {layout.CODED[1:]} has {size} bytes, its parts make {expected}")
    split = {suffix: entry for suffix, entry in entries.items() if suffix != layout.CODED}
    if dense:
        split[layout.DENSE] = coded[: dense + SLACK_BYTES]
    if sparse:
        split[layout.SPARSE] = coded[dense : dense + layout.padded_size(sparse)]
    begin = dense + sparse
    small = _unpack_side(name, spec, to_host(coded[begin : begin + side]))
    return split, small


def _entry_bytes(parts: tuple[int, int, int]) -> int:
    """Bytes of the entry that holds parts of these sizes."""
    dense, sparse, side = parts
    return -(-(dense + sparse + max(side, ROOM_BYTES)) // layout.ALIGNMENT_BYTES) * layout.ALIGNMENT_BYTES


def _unpack_side(name: str, spec: TensorSpec, side: NDArray[Any]) -> dict[str, NDArray[Any]]:
    wanted: list[tuple[str, str, int]] = []
    if spec.parts is not None and spec.parts[1]:
        blocks = block_count(spec.rows, spec.columns, spec.blocks)
        wanted.append((layout.SPARSE_SIZES, "U16", blocks))
    forms = spec.kind.stored if isinstance(spec.kind, GridKind) else {}
    for which in SCALE_ARRAYS:
        if which in forms:
            form = forms[which]
            count = spec.columns if which == "column_scale" else spec.rows
            wanted.append((f".{which}", form if isinstance(form, str) else "U8", count))
    if not wanted:
        if side.size:
            raise FormatError(f"{name}: {side.size} bytes follow its streams, which its spec does not tell of")
        return {}
    arrays = layout.inflate(f"{name}{layout.CODED}", side, [(dtype, count) for _, dtype, count in wanted])
    return {suffix: array for (suffix, _, _), array in zip(wanted, arrays, strict=True)}
