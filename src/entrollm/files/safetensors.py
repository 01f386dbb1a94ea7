"""A strict reader of safetensors files: the header is fully checked, tensors are views of one memory map.

The layout is `u64 little-endian header size | JSON header | data`. The header is parsed here, because the `safetensors`
package hides the offsets that zero-copy views need. Everything that the format forbids is refused with an error.
"""

import json
import math
import mmap
import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Any, BinaryIO, Self

import numpy as np
from numpy.typing import NDArray

from entrollm.errors import FormatError
from entrollm.files.dtypes import DTYPES
from entrollm.system import naming

_LENGTH_BYTES = 8
_MAX_HEADER_BYTES = 100_000_000
# Arrays of NumPy 1 have at most 32 axes, and sizes in NumPy are signed 64-bit integers.
_MAX_AXES = 32
_MAX_ARRAY_BYTES = 2**63 - 1
_ENTRY_KEYS = frozenset({"dtype", "shape", "data_offsets"})


@dataclass(frozen=True, slots=True)
class Entry:
    """One tensor of a file.

    Attributes:
        dtype: a key of DTYPES.
        shape: its shape.
        begin, end: byte offsets from the start of the file.
    """

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def size_bytes(self) -> int:
        """Size of the tensor's data."""
        return self.end - self.begin


class SafetensorsFile:
    """A memory-mapped safetensors file; made by `open_safetensors`. Views stay valid after `close`."""

    def __init__(self, path: Path, metadata: dict[str, str], tensors: dict[str, Entry], data: mmap.mmap) -> None:
        self.path = path
        self.metadata = metadata
        self.tensors: Mapping[str, Entry] = MappingProxyType(tensors)
        self.size_bytes = len(data)
        self._data: mmap.mmap | None = data

    def array(self, name: str) -> NDArray[Any]:
        """A read-only view of a tensor; its bytes are neither read nor copied.

        Raises:
            KeyError: the file has no tensor of this name.
            ValueError: the file is closed.
        """
        entry = self.tensors[name]
        dtype = DTYPES[entry.dtype]
        # `open_safetensors` has checked that [begin, end) lies in the file and has exactly the size of this shape.
        flat = np.frombuffer(self._map(), dtype=dtype, count=entry.size_bytes // dtype.itemsize, offset=entry.begin)
        return flat.reshape(entry.shape)

    def release(self, name: str) -> None:
        """Tell the system that a tensor's pages need not stay resident; views stay valid."""
        entry = self.tensors[name]
        begin = entry.begin - entry.begin % mmap.PAGESIZE
        if entry.end > begin and hasattr(mmap, "MADV_DONTNEED"):
            self._map().madvise(mmap.MADV_DONTNEED, begin, entry.end - begin)

    def prefetch(self, name: str) -> None:
        """Tell the system to read a tensor's pages, and go on."""
        entry = self.tensors[name]
        begin = entry.begin - entry.begin % mmap.PAGESIZE
        if entry.end > begin and hasattr(mmap, "MADV_WILLNEED"):
            self._map().madvise(mmap.MADV_WILLNEED, begin, entry.end - begin)

    def close(self) -> None:
        """Close the file; it is unmapped when the last view is gone."""
        self._data = None

    def _map(self) -> mmap.mmap:
        if self._data is None:
            raise ValueError(f"{self.path} is closed")
        return self._data

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def open_safetensors(path: str | Path) -> SafetensorsFile:
    """Open a safetensors file: check its header, and map its data.

    Raises:
        FormatError: the file is not exactly one safetensors file; the message names the file and the tensor.
        OSError: the file cannot be opened.
    """
    path = Path(path)
    with path.open("rb") as stream:
        size_bytes = os.fstat(stream.fileno()).st_size
        header, data_begin = _read_header(path, stream, size_bytes)
        metadata = _check_metadata(path, header.pop("__metadata__", None))
        entries = {name: _check_entry(path, name, fields, data_begin) for name, fields in header.items()}
        ordered = dict(sorted(entries.items(), key=lambda item: (item[1].begin, item[1].end)))
        _check_cover(path, ordered, data_begin, size_bytes)
        with naming(path):
            data = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
    if len(data) != size_bytes:
        raise FormatError(f"{path}: the file changed from {size_bytes} to {len(data)} bytes while it was opened")
    return SafetensorsFile(path, metadata, ordered, data)


def header_bytes(path: Path) -> bytes:
    """The length and the header of a safetensors file, as they are stored.

    Raises:
        FormatError: the file ends before its header does, or the header is longer than the format allows.
    """
    with path.open("rb") as stream:
        length = _header_length(path, stream, os.fstat(stream.fileno()).st_size)
        stream.seek(0)
        return stream.read(_LENGTH_BYTES + length)


def parse_json_object(path: Path, text: bytes, what: str) -> dict[str, Any]:
    """Parse UTF-8 JSON that must be one object without duplicate keys, NaN and infinities.

    Args:
        path: the file, for errors.
        text: the JSON.
        what: what the text is, for errors, such as 'the header'.
    Raises:
        FormatError: the text is not such an object.
    """

    def refuse_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) != len(pairs):
            ((twice, _),) = Counter(name for name, _ in pairs).most_common(1)
            raise FormatError(f"{path}: {what} has the key {twice!r} twice")
        return result

    def refuse_constant(constant: str) -> Any:
        raise FormatError(f"{path}: {what} holds {constant}, which is not JSON")

    def read_float(number: str) -> float:
        value = float(number)
        if math.isinf(value):
            raise FormatError(f"{path}: {what} holds {number:.40}, which is too large for a number")
        return value

    try:
        parsed = json.loads(
            text.decode("utf-8"),
            object_pairs_hook=refuse_duplicates,
            parse_constant=refuse_constant,
            parse_float=read_float,
        )
    except (ValueError, RecursionError) as error:  # not UTF-8, not JSON, too long an integer, too deep nesting
        raise FormatError(f"{path}: {what} is not valid JSON: {error}") from None
    if not isinstance(parsed, dict):
        raise FormatError(f"{path}: {what} must be a JSON object, found {type(parsed).__name__}")
    return parsed


def _read_header(path: Path, stream: BinaryIO, size_bytes: int) -> tuple[dict[str, Any], int]:
    """The parsed header, and the offset at which the data begins."""
    length = _header_length(path, stream, size_bytes)
    text = stream.read(length)
    if not text.startswith(b"{"):
        raise FormatError(
            f"{path}: the header must begin with '{{', found {text[:1]!r}; this is not a safetensors file"
        )
    return parse_json_object(path, text, "the header"), _LENGTH_BYTES + length


def _header_length(path: Path, stream: BinaryIO, size_bytes: int) -> int:
    """The checked length of the header, which follows."""
    if size_bytes < _LENGTH_BYTES:
        raise FormatError(
            f"{path}: a safetensors file begins with an 8-byte length, found a file of {size_bytes} bytes; "
            "fetch the file again"
        )
    length = int.from_bytes(stream.read(_LENGTH_BYTES), "little")
    if length > _MAX_HEADER_BYTES:
        raise FormatError(
            f"{path}: the header claims {length} bytes, at most {_MAX_HEADER_BYTES} are allowed; "
            "this is not a safetensors file, or it is a Git LFS pointer in place of one"
        )
    if _LENGTH_BYTES + length > size_bytes:
        raise FormatError(
            f"{path}: the header claims {length} bytes, but the file ends after {size_bytes} bytes; "
            "it is truncated, fetch it again"
        )
    return length


def _check_metadata(path: Path, metadata: object) -> dict[str, str]:
    if metadata is None:
        return {}
    if not isinstance(metadata, dict):
        raise FormatError(f"{path}: __metadata__ must be an object of strings, found {type(metadata).__name__}")
    for key, value in metadata.items():
        if not isinstance(value, str):
            raise FormatError(f"{path}: __metadata__[{key!r}] must be a string, found {type(value).__name__}")
    return metadata


def _check_entry(path: Path, name: str, fields: object, data_begin: int) -> Entry:
    """Check one tensor by itself. Python integers do not overflow, so no size can wrap around."""
    where = f"{path}: tensor {name!r}"
    if not isinstance(fields, dict) or fields.keys() != _ENTRY_KEYS:
        found = sorted(fields) if isinstance(fields, dict) else type(fields).__name__
        raise FormatError(f"{where} must have exactly dtype, shape and data_offsets, found {found}")
    dtype, shape, offsets = fields["dtype"], fields["shape"], fields["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise FormatError(f"{where} has dtype {dtype!r}, expected one of {', '.join(DTYPES)}")
    if not isinstance(shape, list) or not all(_is_count(length) for length in shape):
        raise FormatError(f"{where} has shape {shape!r}, expected a list of integers of at least 0")
    if len(shape) > _MAX_AXES:
        raise FormatError(f"{where} has {len(shape)} axes, at most {_MAX_AXES} are supported")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(_is_count(offset) for offset in offsets):
        raise FormatError(f"{where} has data_offsets {offsets!r}, expected two integers of at least 0")
    begin, end = offsets
    if begin > end:
        raise FormatError(f"{where} has data_offsets {offsets!r}, which end before they begin")
    itemsize = DTYPES[dtype].itemsize
    # An axis of length 0 must not hide another axis that is too long for an array.
    if math.prod(max(length, 1) for length in shape) * itemsize > _MAX_ARRAY_BYTES:
        raise FormatError(f"{where} has shape {shape!r}, which is more than an array can hold")
    size_bytes = math.prod(shape) * itemsize
    if end - begin != size_bytes:
        raise FormatError(f"{where} of shape {shape} {dtype} takes {size_bytes} bytes, its offsets give {end - begin}")
    return Entry(dtype, tuple(shape), data_begin + begin, data_begin + end)


def _is_count(value: object) -> bool:
    return type(value) is int and value >= 0


def _check_cover(path: Path, ordered: dict[str, Entry], data_begin: int, size_bytes: int) -> None:
    """Check that the tensors, in order of offset, fill the file without holes and overlaps."""
    expected = data_begin
    for name, entry in ordered.items():
        if entry.begin < expected:
            raise FormatError(f"{path}: tensor {name!r} overlaps another by {expected - entry.begin} bytes")
        if entry.begin > expected:
            raise FormatError(f"{path}: {entry.begin - expected} bytes before tensor {name!r} belong to no tensor")
        if entry.end > size_bytes:
            raise FormatError(
                f"{path}: tensor {name!r} ends at byte {entry.end}, but the file has {size_bytes} bytes; "
                "it is truncated, fetch it again"
            )
        expected = entry.end
    if expected != size_bytes:
        raise FormatError(f"{path}: the tensors end at byte {expected}, but the file has {size_bytes} bytes")
