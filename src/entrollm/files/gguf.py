"""A strict reader of GGUF files: header and tensor table are fully checked, tensors are views of one memory map.

The layout of versions 2 and 3, little-endian: `GGUF` | u32 version | u64 tensors | u64 pairs | key-value pairs |
tensor table | padding to the alignment | data. Strings and arrays begin with a 64-bit length, which is checked against
the bytes that are left.
"""

from __future__ import annotations

import math
import mmap
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from entrollm.errors import FormatError, UnsupportedError
from entrollm.system import naming

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_DEFAULT_ALIGNMENT = 32
_MAX_AXES = 4
_STRING, _ARRAY = 8, 9
# The struct codes of value types of fixed size, by ggml's number of the type.
_FIXED = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_NUMBERS = {code: struct.Struct("<" + code) for code in _FIXED.values()}
_LENGTH = _NUMBERS["Q"]
_MAX_ARRAY_BYTES = 2**63 - 1

FLOAT_TYPES: Mapping[str, np.dtype[Any]] = MappingProxyType(
    {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": np.dtype(ml_dtypes.bfloat16)}
)


@dataclass(frozen=True, slots=True)
class BlockType:
    """A type of quantized block: `weights` weights of a row in `size_bytes` bytes."""

    name: str
    weights: int
    size_bytes: int


# The block types by ggml's number; floats are blocks of one weight.
BLOCK_TYPES: Mapping[int, BlockType] = MappingProxyType(
    {
        0: BlockType("F32", 1, 4),
        1: BlockType("F16", 1, 2),
        2: BlockType("Q4_0", 32, 18),
        3: BlockType("Q4_1", 32, 20),
        6: BlockType("Q5_0", 32, 22),
        7: BlockType("Q5_1", 32, 24),
        8: BlockType("Q8_0", 32, 34),
        10: BlockType("Q2_K", 256, 84),
        11: BlockType("Q3_K", 256, 110),
        12: BlockType("Q4_K", 256, 144),
        13: BlockType("Q5_K", 256, 176),
        14: BlockType("Q6_K", 256, 210),
        15: BlockType("Q8_K", 256, 292),
        16: BlockType("IQ2_XXS", 256, 66),
        17: BlockType("IQ2_XS", 256, 74),
        18: BlockType("IQ3_XXS", 256, 98),
        19: BlockType("IQ1_S", 256, 50),
        20: BlockType("IQ4_NL", 32, 18),
        21: BlockType("IQ3_S", 256, 110),
        22: BlockType("IQ2_S", 256, 82),
        23: BlockType("IQ4_XS", 256, 136),
        29: BlockType("IQ1_M", 256, 56),
        30: BlockType("BF16", 1, 2),
        34: BlockType("TQ1_0", 256, 54),
        35: BlockType("TQ2_0", 256, 66),
        39: BlockType("MXFP4", 32, 17),
        40: BlockType("NVFP4", 64, 36),
    }
)
# Names of other types, for the error only.
_OTHER_TYPES: Mapping[int, str] = MappingProxyType(
    {9: "Q8_1", 24: "I8", 25: "I16", 26: "I32", 27: "I64", 28: "F64", 41: "Q1_0"}
)


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """One tensor of a file.

    Attributes:
        type: the type of its blocks.
        shape: rows first.
        begin, end: byte offsets from the start of the file.
    """

    type: BlockType
    shape: tuple[int, ...]
    begin: int
    end: int


class GgufFile:
    """A memory-mapped GGUF file; made by `open_gguf`. Views stay valid after `close`."""

    def __init__(self, path: Path, metadata: dict[str, Any], tensors: dict[str, GgufTensor], data: mmap.mmap) -> None:
        self.path = path
        self.parts: tuple[GgufFile, ...] = (self,)
        self.metadata: Mapping[str, Any] = MappingProxyType(metadata)
        self.tensors: Mapping[str, GgufTensor] = MappingProxyType(tensors)
        self.size_bytes = len(data)
        self._data: mmap.mmap | None = data

    def array(self, name: str) -> NDArray[Any]:
        """A read-only view of a tensor: in its float type and shape, or uint8 (rows, bytes of a row) for blocks.

        Raises:
            KeyError: the file has no tensor of this name.
            ValueError: the file is closed.
        """
        tensor = self.tensors[name]
        if self._data is None:
            raise ValueError(f"{self.path} is closed")
        octets = np.frombuffer(self._data, np.uint8, tensor.end - tensor.begin, tensor.begin)
        dtype = FLOAT_TYPES.get(tensor.type.name)
        if dtype is not None:
            return octets.view(dtype).reshape(tensor.shape)
        return octets.reshape(math.prod(tensor.shape[:-1]), -1)

    def release(self, name: str) -> None:
        """Tell the system that a tensor's pages need not stay resident; views stay valid."""
        tensor = self.tensors[name]
        begin = tensor.begin - tensor.begin % mmap.PAGESIZE
        if self._data is not None and tensor.end > begin and hasattr(mmap, "MADV_DONTNEED"):
            self._data.madvise(mmap.MADV_DONTNEED, begin, tensor.end - begin)

    def close(self) -> None:
        """Close the file; it is unmapped when the last view is gone."""
        self._data = None


def open_gguf(path: str | Path) -> GgufFile:
    """Open a GGUF file: check its header and tensor table, and map its data.

    Raises:
        FormatError: the file is malformed or truncated; the message names it.
        UnsupportedError: its version, or the type of a tensor, is not supported.
        OSError: the file cannot be opened.
    """
    path = Path(path)
    with path.open("rb") as stream:
        if os.fstat(stream.fileno()).st_size < len(_MAGIC) + 20:
            raise FormatError(f"{path}: too short for a GGUF file; fetch it again")
        with naming(path):
            data = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
    header = _Header(path, data)
    metadata, tensors = header.read()
    return GgufFile(path, metadata, tensors, data)


class _Header:
    """Reads values one after another, and checks every length against the bytes that are left."""

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self._path = path
        self._data = data
        self._size = len(data)
        self._at = 0

    def read(self) -> tuple[dict[str, Any], dict[str, GgufTensor]]:
        if self._take(4) != _MAGIC:
            raise FormatError(f"{self._path}: it does not begin with GGUF; this is not a GGUF file")
        version = self._number("I")
        if version not in _VERSIONS:
            raise UnsupportedError(f"{self._path}: GGUF version {version}; supported are {_VERSIONS}")
        tensors, pairs = self._count(24), self._count(13)
        metadata: dict[str, Any] = {}
        for _ in range(pairs):
            key = self._string()
            if key in metadata:
                raise FormatError(f"{self._path}: the key {key!r:.80} occurs twice")
            metadata[key] = self._value(self._number("I"))
        table = [self._tensor() for _ in range(tensors)]
        alignment = metadata.get("general.alignment", _DEFAULT_ALIGNMENT)
        if type(alignment) is not int or alignment < 8 or alignment & (alignment - 1):
            raise FormatError(
                f"{self._path}: general.alignment is {alignment!r:.80}, expected a power of two from 8 on"
            )
        return metadata, self._place(table, -(-self._at // alignment) * alignment, alignment)

    def _take(self, size: int) -> bytes:
        self._need(size)
        self._at += size
        return self._data[self._at - size : self._at]

    def _need(self, size: int) -> None:
        if size > self._size - self._at:
            raise FormatError(
                f"{self._path}: byte {self._at} begins something of {size} bytes, but the file has {len(self._data)}; "
                "it is truncated or damaged, fetch it again"
            )

    def _number(self, code: str) -> Any:
        number = _NUMBERS[code]
        self._need(number.size)
        self._at += number.size
        return number.unpack_from(self._data, self._at - number.size)[0]

    def _count(self, item_bytes: int) -> int:
        """A 64-bit count of items that take at least `item_bytes` bytes each."""
        count: int = self._number("Q")
        self._need(count * item_bytes)
        return count

    def _string(self) -> str:
        # Vocabularies have hundreds of thousands of them, so this calls little.
        self._need(_LENGTH.size)
        begin = self._at = self._at + _LENGTH.size
        (size,) = _LENGTH.unpack_from(self._data, begin - _LENGTH.size)
        self._need(size)
        self._at += size
        try:
            return self._data[begin : self._at].decode("utf-8")
        except UnicodeDecodeError as error:
            raise FormatError(f"{self._path}: a string before byte {self._at} is not UTF-8: {error}") from None

    def _value(self, kind: int) -> Any:
        if kind in _FIXED:
            return self._number(_FIXED[kind])
        if kind == _STRING:
            return self._string()
        if kind != _ARRAY:
            raise FormatError(f"{self._path}: a value before byte {self._at} is of the unknown type {kind}")
        kind = self._number("I")
        if kind == _STRING:
            return [self._string() for _ in range(self._count(8))]
        if kind not in _FIXED:
            raise FormatError(
                f"{self._path}: an array before byte {self._at} is of type {kind}, which is not supported"
            )
        count = self._count(_NUMBERS[_FIXED[kind]].size)
        code = f"<{count}{_FIXED[kind]}"
        return list(struct.unpack(code, self._take(struct.calcsize(code))))

    def _tensor(self) -> tuple[str, tuple[int, ...], BlockType, int]:
        name = self._string()
        axes = self._number("I")
        if not 1 <= axes <= _MAX_AXES:
            raise FormatError(f"{self._path}: tensor {name!r:.80} has {axes} axes, expected 1 to {_MAX_AXES}")
        shape = tuple(reversed(struct.unpack(f"<{axes}Q", self._take(8 * axes))))
        number, offset = self._number("I"), self._number("Q")
        if number not in BLOCK_TYPES:
            found = _OTHER_TYPES.get(number, f"number {number}")
            known = ", ".join(kind.name for kind in BLOCK_TYPES.values())
            raise UnsupportedError(f"{self._path}: tensor {name!r:.80} is of type {found}; supported are {known}")
        return name, shape, BLOCK_TYPES[number], offset

    def _place(
        self, table: list[tuple[str, tuple[int, ...], BlockType, int]], begin: int, alignment: int
    ) -> dict[str, GgufTensor]:
        tensors: dict[str, GgufTensor] = {}
        end_of_last = begin
        for name, shape, kind, offset in sorted(table, key=lambda entry: entry[3]):
            where = f"{self._path}: tensor {name!r:.80}"
            if name in tensors:
                raise FormatError(f"{where} occurs twice")
            if 0 in shape or math.prod(shape) > _MAX_ARRAY_BYTES or shape[-1] % kind.weights:
                raise FormatError(f"{where} has shape {list(shape)}, expected rows of whole {kind.name} blocks")
            size_bytes = math.prod(shape) // kind.weights * kind.size_bytes
            if offset % alignment or begin + offset < end_of_last:
                raise FormatError(f"{where} begins at {offset}, which is not aligned, or lies in another tensor")
            end_of_last = begin + offset + size_bytes
            if end_of_last > len(self._data):
                raise FormatError(
                    f"{where} ends at byte {end_of_last}, but the file has {len(self._data)} bytes; it is truncated, "
                    "fetch it again"
                )
            tensors[name] = GgufTensor(kind, shape, begin + offset, end_of_last)
        return tensors
