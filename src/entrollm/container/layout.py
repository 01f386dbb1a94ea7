"""Byte layout of a compressed safetensors file: entry names, alignment, header; see docs/format.md."""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from entrollm._core import SLACK_BYTES
from entrollm.checkpoint import DTYPES
from entrollm.errors import CorruptStreamError
from entrollm.specs import FORMAT_VERSION, GROUP_ARRAY_TYPES

ALIGNMENT_BYTES = 64
QUANT_METHOD = "entrollm"
INDEX_NAME = "model.safetensors.index.json"
# Keys of __metadata__ that are not tensor names.
VERSION_KEY = "entrollm.version"
PLAIN_KEY = "entrollm.plain"
FORMAT_KEY = "format"
RESERVED_KEYS = frozenset({VERSION_KEY, PLAIN_KEY, FORMAT_KEY})

# A matrix NAME is stored as entries NAME + suffix; their order is the order of the checksum.
DENSE, SPARSE, SPARSE_SIZES, SCALE, OFFSET, COLUMN_SCALE = _PLAIN_SUFFIXES = (
    ".dense",
    ".sparse",
    ".sparse_sizes",
    ".scale",
    ".offset",
    ".column_scale",
)
# What group scales consist of; these entries are deflated, see `pack_array`.
GROUP_SUFFIXES = tuple(f".{name}" for name in GROUP_ARRAY_TYPES)
SUFFIXES = (*_PLAIN_SUFFIXES, *GROUP_SUFFIXES)
# The types that an entry may have; bf16 halves the scales where a quantizer rounds with the scales it stores.
SUFFIX_DTYPES: Mapping[str, tuple[str, ...]] = {
    DENSE: ("U8",),
    SPARSE: ("U8",),
    SPARSE_SIZES: ("U16",),
    SCALE: ("F32", "BF16"),
    OFFSET: ("F32",),
    COLUMN_SCALE: ("F32", "BF16"),
    **dict.fromkeys(GROUP_SUFFIXES, ("U8",)),
}
# A deflated byte stands for at most this many.
_MAX_INFLATION = 1032
_INDEX_DIGITS = 9
_CHECKSUM_TAIL = ',"crc32":"00000000"}'
# Streams that the engine reads in place; the others are small and copied at load.
STREAMS = (DENSE, SPARSE)


def entry_dtype(suffix: str, array: NDArray[Any]) -> str:
    """The safetensors type that an array of a matrix is stored as.

    Raises:
        TypeError: the entry cannot have the array's type.
    """
    for name in SUFFIX_DTYPES[suffix]:
        if array.dtype == DTYPES[name]:
            return name
    raise TypeError(f"{suffix[1:]} is stored as {' or '.join(SUFFIX_DTYPES[suffix])}, not {array.dtype}")


@dataclass(frozen=True, slots=True)
class StoredEntry:
    """One tensor of a safetensors file that is being written."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    size_bytes: int


def padded_stream(parts: Iterable[NDArray[np.uint8]]) -> NDArray[np.uint8]:
    """Join the parts of a stream and pad it: wide loads may run past its end, and the next stream must be aligned.

    An empty stream stays empty and is not stored.
    """
    chunks = list(parts)
    size = sum(chunk.size for chunk in chunks)
    if size == 0:
        return np.zeros(0, np.uint8)
    stored = -(-(size + SLACK_BYTES) // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
    return np.concatenate([*chunks, np.zeros(stored - size, np.uint8)])


def pack_array(array: NDArray[Any]) -> NDArray[np.uint8]:
    """Deflate an array, the first bytes of all elements first: those of scales are alike, the others hardly."""
    octets = np.ascontiguousarray(array).reshape(-1, 1).view(np.uint8)
    return np.frombuffer(zlib.compress(np.ascontiguousarray(octets.T).tobytes(), 9), np.uint8)


def unpack_array(name: str, stored: NDArray[np.uint8], dtype: str, count: int) -> NDArray[Any]:
    """Undo `pack_array`.

    Args:
        name: the entry, for errors.
        stored: its bytes.
        dtype, count: type and number of the elements that it must hold.
    Raises:
        CorruptStreamError: the entry is not exactly one deflated array of this size.
    """
    itemsize = DTYPES[dtype].itemsize
    if count * itemsize > stored.size * _MAX_INFLATION:
        raise CorruptStreamError(f"{name}: {stored.size} bytes cannot hold {count} numbers of type {dtype}")
    inflate = zlib.decompressobj()
    try:
        octets = inflate.decompress(stored.tobytes(), count * itemsize + 1)
    except zlib.error as error:
        raise CorruptStreamError(f"{name}: {error}; the file is damaged, compress or fetch it again") from None
    if len(octets) != count * itemsize or not inflate.eof or inflate.unused_data:
        raise CorruptStreamError(f"{name}: it does not hold exactly {count} numbers of type {dtype}")
    columns = np.frombuffer(octets, np.uint8).reshape(itemsize, count)
    return np.ascontiguousarray(columns.T).view(DTYPES[dtype]).reshape(count)


def checksum(name: str, spec_text: str, arrays: Mapping[str, NDArray[Any]]) -> int:
    """CRC-32 over a matrix: name, JSON spec up to the checksum at its end, arrays in the order of SUFFIXES."""
    value = zlib.crc32((name + spec_text[: -len(_CHECKSUM_TAIL)]).encode())
    for suffix in SUFFIXES:
        if suffix in arrays:
            value = zlib.crc32(arrays[suffix].view(np.uint8).data, value)
    return value


def matrix_bytes(name: str, spec_text: str, arrays: Mapping[str, NDArray[Any]]) -> int:
    """What a matrix adds to its file: its arrays, their header entries and its spec, to within a few bytes."""
    size = len(json.dumps(name)) + len(json.dumps(spec_text)) + 2
    for suffix, array in arrays.items():
        if array.size:
            entry = {"dtype": entry_dtype(suffix, array), "shape": [array.size], "data_offsets": [10**6, 10**6]}
            size += array.nbytes + len(json.dumps(name + suffix)) + len(json.dumps(entry, separators=(",", ":"))) + 2
    return size


def build_header(entries: Iterable[StoredEntry], metadata: Mapping[str, str]) -> bytes:
    """The header of a safetensors file whose data starts at a multiple of ALIGNMENT_BYTES."""
    fields: dict[str, Any] = {"__metadata__": dict(metadata)}
    begin = 0
    for entry in entries:
        end = begin + entry.size_bytes
        fields[entry.name] = {"dtype": entry.dtype, "shape": list(entry.shape), "data_offsets": [begin, end]}
        begin = end
    text = json.dumps(fields, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-(8 + len(text)) % ALIGNMENT_BYTES)
    return len(text).to_bytes(8, "little") + text


def file_metadata(specs: Mapping[str, str], plain: Mapping[str, int]) -> dict[str, str]:
    """The __metadata__ of a shard: the specs of its matrices, and the CRC-32 of every other tensor."""
    checksums = json.dumps({name: f"{value:08x}" for name, value in plain.items()}, separators=(",", ":"))
    return {FORMAT_KEY: "pt", VERSION_KEY: str(FORMAT_VERSION), PLAIN_KEY: checksums, **specs}


def stack_member(name: str) -> tuple[str, int] | None:
    """The tensor of three axes that a coded matrix is one matrix of, and which; None for a tensor of its own."""
    stack, _, index = name.rpartition(".")
    is_number = len(index) <= _INDEX_DIGITS and index.isascii() and index.isdigit() and str(int(index)) == index
    return (stack, int(index)) if stack and is_number else None


def member_name(stack: str, index: int) -> str:
    """The name that matrix `index` of a tensor of three axes is coded under."""
    return f"{stack}.{index}"


def shard_name(index: int, count: int) -> str:
    """The file name of shard `index` (from 0) of `count`, as transformers names them."""
    return "model.safetensors" if count == 1 else f"model-{index + 1:05d}-of-{count:05d}.safetensors"
