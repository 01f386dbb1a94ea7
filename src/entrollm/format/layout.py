"""Byte layout of a compressed safetensors file: entry names, alignment, header; see docs/reference/format.md."""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from entrollm._core import SLACK_BYTES
from entrollm.errors import CorruptStreamError
from entrollm.files.dtypes import DTYPES
from entrollm.format.group_scales import GROUP_ARRAY_TYPES

ALIGNMENT_BYTES = 64
QUANT_METHOD = "entrollm"
INDEX_NAME = "model.safetensors.index.json"
# Says which matrices are differences to those of a base; a folder with it is no model by itself.
DIFFERENCE_NAME = "difference.json"
# Keys of __metadata__ that are not tensor names; PLAIN_KEY is of version 1, TENSORS_KEY of later ones.
VERSION_KEY = "entrollm.version"
PLAIN_KEY = "entrollm.plain"
TENSORS_KEY = "entrollm.tensors"
FORMAT_KEY = "format"
RESERVED_KEYS = frozenset({VERSION_KEY, PLAIN_KEY, FORMAT_KEY})

# A matrix NAME is stored as entries NAME + suffix. The checksum covers them in the order of SUFFIXES. Version 2 joins
# six entries of version 1 into one.
CODED = ".coded"
DENSE, SPARSE, SPARSE_SIZES, SCALE, OFFSET, COLUMN_SCALE = _SEPARATE_SUFFIXES = (
    ".dense",
    ".sparse",
    ".sparse_sizes",
    ".scale",
    ".offset",
    ".column_scale",
)
# Fields and first symbols of the segments of a flat code; always a part of the one entry.
SEGMENTS = ".segments"
# Entries of group scales; each is one deflated array.
GROUP_SUFFIXES = tuple(f".{name}" for name in GROUP_ARRAY_TYPES)
# The bytes of lossless words that are not coded, (rows, columns), with the padding of a stream.
LOW = ".low"
SUFFIXES = (CODED, LOW, *_SEPARATE_SUFFIXES, *GROUP_SUFFIXES)
# The entries that a file of each version may have.
VERSION_1_SUFFIXES = (*_SEPARATE_SUFFIXES, *GROUP_SUFFIXES)
VERSION_2_SUFFIXES = (CODED, LOW, *GROUP_SUFFIXES)
# The types that an entry may have. Scales may be BF16, which halves them, if the quantizer rounded with BF16 scales.
SUFFIX_DTYPES: Mapping[str, tuple[str, ...]] = {
    CODED: ("U8",),
    LOW: ("U8",),
    DENSE: ("U8",),
    SPARSE: ("U8",),
    SPARSE_SIZES: ("U16",),
    SCALE: ("F32", "BF16"),
    OFFSET: ("F32",),
    COLUMN_SCALE: ("F32", "BF16"),
    **dict.fromkeys(GROUP_SUFFIXES, ("U8",)),
}
# One deflated byte inflates to at most this many.
_MAX_INFLATION = 1032
_INDEX_DIGITS = 9
_TRANSPOSED = ".T"
_CHECKSUM_TAIL = ',"crc32":"00000000"}'
# The engine reads these streams in place; it copies small arrays at load.
STREAMS = (DENSE, SPARSE)
# Entries that products read in place; writers place them first, so that they stay aligned.
ALIGNED = (CODED, LOW)


def entry_dtype(suffix: str, array: NDArray[Any]) -> str:
    """The safetensors type of an entry that holds `array`.

    Raises:
        TypeError: the entry may not have this type.
    """
    for name in SUFFIX_DTYPES[suffix]:
        if array.dtype == DTYPES[name]:
            return name
    raise TypeError(f"{suffix[1:]} is stored as {' or '.join(SUFFIX_DTYPES[suffix])}, not {array.dtype}")


@dataclass(frozen=True, slots=True)
class FileEntry:
    """One entry of a safetensors file that is being written."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    size_bytes: int


def padded_stream(parts: Iterable[NDArray[np.uint8]]) -> NDArray[np.uint8]:
    """Join the parts of a stream and pad it, because wide loads may run past its end.

    An empty stream stays empty and is not stored.
    """
    chunks = list(parts)
    size = sum(chunk.size for chunk in chunks)
    if size == 0:
        return np.zeros(0, np.uint8)
    return np.concatenate([*chunks, np.zeros(padded_size(size) - size, np.uint8)])


def padded_size(size: int) -> int:
    """Bytes that a stream of `size` bytes takes with its padding."""
    return -(-(size + SLACK_BYTES) // ALIGNMENT_BYTES) * ALIGNMENT_BYTES if size else 0


def deflate(arrays: Sequence[NDArray[Any]]) -> NDArray[np.uint8]:
    """Deflate arrays into one stream.

    The bytes of an array are ordered by their place in the element (first all first bytes, then all second bytes),
    because scales share their high bytes.
    """
    octets = (np.ascontiguousarray(array).reshape(-1, 1).view(np.uint8).T.tobytes() for array in arrays)
    return np.frombuffer(zlib.compress(b"".join(octets), 9), np.uint8)


def deflate_array(array: NDArray[Any]) -> NDArray[np.uint8]:
    """Deflate one array."""
    return deflate([array])


def inflate(name: str, stored: NDArray[np.uint8], forms: Sequence[tuple[str, int]]) -> list[NDArray[Any]]:
    """Undo `deflate`.

    Args:
        name: the entry, for errors.
        stored: its bytes.
        forms: type and number of elements of each array.
    Raises:
        CorruptStreamError: the entry is not exactly one deflated stream of these arrays.
    """
    what = " and ".join(f"{count} numbers of type {dtype}" for dtype, count in forms)
    size = sum(count * DTYPES[dtype].itemsize for dtype, count in forms)
    if size > stored.size * _MAX_INFLATION:
        raise CorruptStreamError(f"{name}: {stored.size} bytes cannot hold {what}")
    decompressor = zlib.decompressobj()
    try:
        octets = decompressor.decompress(stored.tobytes(), size + 1)
    except zlib.error as error:
        raise CorruptStreamError(f"{name}: {error}; the file is damaged, compress or fetch it again") from None
    if len(octets) != size or not decompressor.eof or decompressor.unused_data:
        raise CorruptStreamError(f"{name}: it does not hold exactly {what}")
    arrays, at = [], 0
    for dtype, count in forms:
        itemsize = DTYPES[dtype].itemsize
        planes = np.frombuffer(octets, np.uint8, count * itemsize, at).reshape(itemsize, count)
        arrays.append(np.ascontiguousarray(planes.T).view(DTYPES[dtype]).reshape(count))
        at += count * itemsize
    return arrays


def inflate_array(name: str, stored: NDArray[np.uint8], dtype: str, count: int) -> NDArray[Any]:
    """Undo `deflate_array`, with the errors of `inflate`."""
    return inflate(name, stored, [(dtype, count)])[0]


def checksum(name: str, spec_text: str, entries: Mapping[str, NDArray[Any]]) -> int:
    """CRC-32 of a matrix: its name, its spec up to the checksum, and its entries in the order of SUFFIXES."""
    value = zlib.crc32((name + spec_text[: -len(_CHECKSUM_TAIL)]).encode())
    for suffix in SUFFIXES:
        if suffix in entries:
            value = zlib.crc32(entries[suffix].view(np.uint8).data, value)
    return value


def with_checksum(spec_text: str, value: int) -> str:
    """The text of a spec with another checksum."""
    return f'{spec_text[: -len(_CHECKSUM_TAIL)]},"crc32":"{value:08x}"}}'


def entry_bytes(name: str, suffix: str, array: NDArray[Any]) -> int:
    """What an entry of a matrix adds to its file, its item in the header included, to within a few bytes."""
    entry = {"dtype": entry_dtype(suffix, array), "shape": [array.size], "data_offsets": [10**6, 10**6]}
    return array.nbytes + len(json.dumps(name + suffix)) + len(json.dumps(entry, separators=(",", ":"))) + 2


def build_header(entries: Iterable[FileEntry], metadata: Mapping[str, str]) -> bytes:
    """The header of a safetensors file, padded so that the data starts at a multiple of ALIGNMENT_BYTES."""
    fields: dict[str, Any] = {"__metadata__": dict(metadata)}
    begin = 0
    for entry in entries:
        end = begin + entry.size_bytes
        fields[entry.name] = {"dtype": entry.dtype, "shape": list(entry.shape), "data_offsets": [begin, end]}
        begin = end
    text = json.dumps(fields, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-(8 + len(text)) % ALIGNMENT_BYTES)
    return len(text).to_bytes(8, "little") + text


def stack_member(name: str) -> tuple[str, int] | None:
    """The stack and the index of a coded matrix that is one matrix of a tensor of three axes; None for any other."""
    stack, _, index = name.rpartition(".")
    is_number = len(index) <= _INDEX_DIGITS and index.isascii() and index.isdigit() and str(int(index)) == index
    return (stack, int(index)) if stack and is_number else None


def is_transposed(name: str) -> bool:
    """Whether a matrix is the transpose of a matrix of the model, or of one matrix of a tensor of three axes."""
    return name.endswith(_TRANSPOSED)


def transposed_name(name: str) -> str:
    """The name of the transpose of a matrix of the model."""
    return name + _TRANSPOSED


def transposed_member(name: str) -> tuple[str, int] | None:
    """As stack_member, of a coded matrix that is the transpose of one matrix of the tensor."""
    return stack_member(name.removesuffix(_TRANSPOSED)) if is_transposed(name) else None


def transposed_matrix(name: str) -> str | None:
    """The matrix of the model that a matrix is the transpose of; None if it is of a stack, or not transposed."""
    return name.removesuffix(_TRANSPOSED) if is_transposed(name) and transposed_member(name) is None else None


def is_kept_member(name: str) -> bool:
    """Whether a plain matrix of this name is one of a stack, as matrices of experts from GGUF files are."""
    member = stack_member(name)
    return transposed_member(name) is not None or (member is not None and _holds_matrices(member[0]))


def _holds_matrices(stack: str) -> bool:
    """Whether a tensor of this name may be a stack of weight matrices."""
    return stack.endswith(".weight") or stack.rpartition(".")[0].endswith(".experts")


def member_name(stack: str, index: int, *, is_transposed: bool = False) -> str:
    """The name of matrix `index` of a tensor of three axes, or of its transpose."""
    return f"{stack}.{index}{_TRANSPOSED if is_transposed else ''}"


def shard_name(index: int, count: int) -> str:
    """The file name of shard `index` (from 0) of `count`, as transformers names them."""
    return "model.safetensors" if count == 1 else f"model-{index + 1:05d}-of-{count:05d}.safetensors"
