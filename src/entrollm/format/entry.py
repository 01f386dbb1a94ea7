"""The one entry that holds a matrix: its two streams, then its small arrays, deflated; see docs/reference/format.md."""

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
from entrollm.format.flat import FlatCode
from entrollm.format.grid import SCALE_ARRAYS, GridKind
from entrollm.format.spec import TensorSpec

# Decoders read whole vectors past the end of either stream, up to the next multiple of ALIGNMENT_BYTES.
ROOM_BYTES = 2 * SLACK_BYTES
_SMALL = (layout.SPARSE_SIZES, layout.SEGMENTS, *(f".{name}" for name in SCALE_ARRAYS))
_JOINED = (layout.DENSE, layout.SPARSE, *_SMALL)


def join_arrays(spec: TensorSpec, arrays: Mapping[str, NDArray[Any]]) -> tuple[TensorSpec, dict[str, NDArray[Any]]]:
    """Join the arrays of a matrix into one entry; arrays of scale groups keep entries of their own.

    Args:
        spec: the spec of the matrix, without parts.
        arrays: the arrays by suffix, streams with their padding; empty arrays are ignored.
    Returns:
        the spec with the sizes of the parts, and the entries by suffix. A matrix that has no bytes has no entry and no
        parts.
    """
    arrays = {suffix: array for suffix, array in arrays.items() if array.size}
    entries = {suffix: array for suffix, array in arrays.items() if suffix not in _JOINED}
    kind = spec.kind
    if isinstance(kind, GridKind):
        if layout.SCALE in arrays and arrays[layout.SCALE].size == 1 < spec.rows:
            kind = dataclasses.replace(kind, scale=float(arrays.pop(layout.SCALE)[0]))
        if layout.OFFSET in arrays and arrays[layout.OFFSET].size == 1 < spec.rows:
            kind = dataclasses.replace(kind, offset=float(arrays.pop(layout.OFFSET)[0]))
        kind = dataclasses.replace(kind, stored=_stored_forms(kind, arrays))
    dense = arrays.get(layout.DENSE, np.zeros(SLACK_BYTES, np.uint8))[:-SLACK_BYTES]
    sizes = arrays.get(layout.SPARSE_SIZES)
    sparse = np.zeros(0, np.uint8) if sizes is None else arrays[layout.SPARSE][: int(sizes.sum(dtype=np.int64))]
    small = [arrays[suffix] for suffix in _SMALL if suffix in arrays]
    side = layout.deflate(small) if small else np.zeros(0, np.uint8)
    if not (dense.size or sparse.size or side.size):
        return dataclasses.replace(spec, kind=kind), entries
    parts = (dense.size, sparse.size, side.size)
    coded = np.concatenate([dense, sparse, side, np.zeros(_entry_bytes(parts) - sum(parts), np.uint8)])
    return dataclasses.replace(spec, kind=kind, parts=parts), {layout.CODED: coded, **entries}


def split_entries(name: str, spec: TensorSpec, entries: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
    """Undo `join_arrays`: the arrays of a matrix by suffix; its streams are views of the entry.

    Args:
        name: the matrix, for errors.
        spec: its spec.
        entries: its entries by suffix.
    Raises:
        FormatError: the entries do not match the spec.
    """
    in_place, inflated = split_entries_with(name, spec, entries, lambda side: side)
    return {**in_place, **inflated}


def split_entries_with(
    name: str, spec: TensorSpec, entries: Mapping[str, Any], to_host: Callable[[Any], NDArray[Any]]
) -> tuple[dict[str, Any], dict[str, NDArray[Any]]]:
    """`split_entries` for entries of any array library.

    Args:
        name: the matrix, for errors.
        spec: its spec.
        entries: arrays of one axis, by suffix.
        to_host: copies a slice of an entry to a NumPy array.
    Returns:
        slices of the entries by suffix, and the small arrays by suffix, which are NumPy arrays.
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
    slices = {suffix: entry for suffix, entry in entries.items() if suffix != layout.CODED}
    if dense:
        slices[layout.DENSE] = coded[: dense + SLACK_BYTES]
    if sparse:
        slices[layout.SPARSE] = coded[dense : dense + layout.padded_size(sparse)]
    begin = dense + sparse
    return slices, _inflate_side(name, spec, to_host(coded[begin : begin + side]))


def _stored_forms(kind: GridKind, arrays: Mapping[str, NDArray[Any]]) -> dict[str, str | int]:
    """The `stored` of a kind with these arrays."""
    forms: dict[str, str | int] = {}
    for name in SCALE_ARRAYS:
        array = arrays.get(f".{name}")
        if array is not None:
            forms[name] = kind.stored[name] if array.dtype == np.uint8 else layout.entry_dtype(f".{name}", array)
    return forms


def _entry_bytes(parts: tuple[int, int, int]) -> int:
    """Bytes of an entry whose parts have these sizes."""
    dense, sparse, side = parts
    return -(-(dense + sparse + max(side, ROOM_BYTES)) // layout.ALIGNMENT_BYTES) * layout.ALIGNMENT_BYTES


def _inflate_side(name: str, spec: TensorSpec, side: NDArray[Any]) -> dict[str, NDArray[Any]]:
    """The small arrays that the spec declares."""
    expected: list[tuple[str, str, int]] = []
    flat = spec.code if isinstance(spec.code, FlatCode) else None
    if spec.parts is not None and spec.parts[1]:
        count = spec.rows if flat else block_count(spec.rows, spec.columns, spec.blocks)
        expected.append((layout.SPARSE_SIZES, "U16", count))
    if flat:
        expected.append((layout.SEGMENTS, "U16", flat.segments(spec.rows)))
    forms = spec.kind.stored if isinstance(spec.kind, GridKind) else {}
    for which in SCALE_ARRAYS:
        if which in forms:
            form = forms[which]
            count = spec.columns if which == "column_scale" else spec.rows
            expected.append((f".{which}", form if isinstance(form, str) else "U8", count))
    if not expected:
        if side.size:
            raise FormatError(f"{name}: {side.size} bytes follow its streams, which its spec does not declare")
        return {}
    arrays = layout.inflate(f"{name}{layout.CODED}", side, [(dtype, count) for _, dtype, count in expected])
    return {suffix: array for (suffix, _, _), array in zip(expected, arrays, strict=True)}
