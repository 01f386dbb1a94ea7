"""Models as differences to their base: the bits of a fine-tuned model lie near those of the model it came from.

A matrix of 16-bit floats becomes a matrix of bytes, its differences below 255, which are coded like any other lossless
words, and a list of the others. The folder cannot run: `restored_matrices` and `export` give back the model.
"""

from __future__ import annotations

import json
import shutil
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from entrollm import _core
from entrollm.checkpoint.model_folder import Checkpoint
from entrollm.checkpoint.resolve import resolve
from entrollm.codec.huffman import entropy_bits
from entrollm.compress.result import FolderResult
from entrollm.errors import CorruptStreamError, EntroLLMError, FormatError, UnsupportedError
from entrollm.files.dtypes import DTYPES
from entrollm.files.safetensors import parse_json_object
from entrollm.format import layout
from entrollm.format.lossless import LosslessKind
from entrollm.format.reader import CompressedModel
from entrollm.format.writer import ShardWriter
from entrollm.matrix import matrix_of
from entrollm.system import scratch_folder

NEAR, FAR = ".difference.weight", ".difference_far"
"""What the bytes of differences and the list of the others are called, after the name of the tensor."""
_TYPES = ("BF16", "F16")
_BYTES, _NUMBERS = "F8_E4M3", "F32"  # their types; no byte is special, and float32 holds the numbers exactly
_FIRST_FAR = 255
_FAR_BITS = 32
_CHUNK_WEIGHTS = 1 << 22
_RAW_BITS = 8  # of a lossless word
_KEYS = {"dtype", "base_crc32", "crc32"}


def differences(words: NDArray[np.uint16], base: NDArray[np.uint16]) -> NDArray[np.uint16]:
    """How far the bits of floats are from those of others, in their numeric order, with the sign in the lowest bit."""
    steps = _ordered(words) - _ordered(base)
    return steps << np.uint16(1) ^ (steps >> np.uint16(15)) * np.uint16(0xFFFF)


def add_differences(found: NDArray[np.uint16], base: NDArray[np.uint16]) -> NDArray[np.uint16]:
    """Undo `differences`."""
    steps = found >> np.uint16(1) ^ (found & np.uint16(1)) * np.uint16(0xFFFF)
    return _ordered(_ordered(base) + steps)


def _ordered(words: NDArray[np.uint16]) -> NDArray[np.uint16]:
    """The bits of floats as integers modulo 2^16 in the order of their values, and the reverse."""
    return words ^ (words >> np.uint16(15)) * np.uint16(0x7FFF)


def write_difference(model: Checkpoint, base: Checkpoint, folder: Path, keep: Sequence[str] = ()) -> int:
    """Write a checkpoint in which matrices are differences to those of a base, where these take fewer bits.

    Args:
        model: the checkpoint.
        base: the one that it was made from.
        folder: an empty folder.
        keep: globs of tensors that do not become differences.
    Returns:
        how many differences are in lists.
    Raises:
        UnsupportedError: the checkpoint is quantized, or a GGUF file.
        EntroLLMError: no difference takes fewer bits than its matrix.
    """
    if model.quantization is not None or model.path.is_file():
        what = "a GGUF file" if model.path.is_file() else f"quantized ({model.quantization})"
        raise UnsupportedError(
            f"{model.path} is {what}, and only ordinary weights become differences; compress it without a base"
        )
    described: dict[str, Any] = {}
    far: dict[str, NDArray[np.float32]] = {}
    with ShardWriter(folder / "model.safetensors", ordinary=True) as writer:
        for name, info in model.tensors.items():
            is_kept = any(fnmatchcase(found, glob) for found in (name, name + NEAR) for glob in keep)
            if is_kept or not _is_smaller(model, base, name):
                writer.add_plain(name, info.dtype, info.shape, [model.array(name)])
                continue
            near = (np.minimum(found, _FIRST_FAR).astype(np.uint8) for found in _chunks(model, base, name))
            writer.add_plain(name + NEAR, _BYTES, info.shape, near)
            others = np.concatenate([found[found >= _FIRST_FAR] for found in _chunks(model, base, name)])
            if len(others):
                far[name + FAR] = others.astype(np.float32)
            described[name] = {
                "dtype": info.dtype,
                "base_crc32": _checksum(base.array(name)),
                "crc32": _checksum(model.array(name)),
            }
            model.release(name)
            base.release(name)
        for name, numbers in far.items():
            writer.add_plain(name, _NUMBERS, numbers.shape, [numbers])
    if not described:
        raise EntroLLMError(
            f"no matrix of {model.path} takes fewer bits as a difference to {base.path}: they share no matrices of "
            "16-bit floats, or differ too much; compress it without a base"
        )
    for file in model.side_files():
        place = folder / file.relative_to(model.path)
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, place)
    (folder / layout.DIFFERENCE_NAME).write_text(json.dumps({"matrices": described}, indent=1) + "\n")
    return sum(len(numbers) for numbers in far.values())


def compress_difference(
    model: str | Path, base: str | Path, out: Path, write: Callable[[Path], FolderResult], keep: Sequence[str] = ()
) -> FolderResult:
    """Compress a checkpoint as differences to a base; its differences lie beside `out` meanwhile.

    Args:
        model, base: checkpoint folders or Hub ids.
        out: the folder to make.
        write: compresses a checkpoint without loss.
        keep: globs of tensors that do not become differences.
    Raises:
        UnsupportedError: the checkpoint is quantized, or a GGUF file.
        EntroLLMError: no difference takes fewer bits than its matrix.
    """
    out = out.absolute()
    out.parent.mkdir(parents=True, exist_ok=True)
    with (
        Checkpoint.open(resolve(model)) as opened,
        Checkpoint.open(resolve(base)) as theirs,
        scratch_folder(f".{out.name}.difference-", out.parent) as folder,
    ):
        listed = write_difference(opened, theirs, folder, keep)
        written = write(folder)
        weights = written.weights - listed
        file_bits = written.file_bytes * 8 / weights
        return replace(written, weights=weights, source_bytes=opened.file_bytes(), file_bits=file_bits)


def _is_smaller(model: Checkpoint, base: Checkpoint, name: str) -> bool:
    """Whether the differences of a matrix take fewer bits, by their entropy, than its own words."""
    info = model.tensors[name]
    theirs = base.tensors.get(name)
    if info.dtype not in _TYPES or len(info.shape) != 2 or 0 in info.shape or name in model.imported:
        return False
    if theirs is None or name in base.imported or (theirs.dtype, theirs.shape) != (info.dtype, info.shape):
        return False
    counts = np.zeros((2, 256), np.int64)
    for found, words in zip(_chunks(model, base, name), _words(model, name), strict=True):
        for row, values in enumerate((np.minimum(found, _FIRST_FAR), (words << np.uint16(1)) >> np.uint16(8))):
            counts[row] += np.bincount(values.reshape(-1), minlength=256)
    near, own = (entropy_bits(row.tolist()) for row in counts)
    return near + _FAR_BITS * int(counts[0, _FIRST_FAR]) / info.weights < own + _RAW_BITS


def _words(checkpoint: Checkpoint, name: str) -> Iterator[NDArray[np.uint16]]:
    array = checkpoint.array(name)
    step = max(1, _CHUNK_WEIGHTS // array.shape[1])
    for begin in range(0, len(array), step):
        yield np.ascontiguousarray(array[begin : begin + step]).view(np.uint16)


def _chunks(model: Checkpoint, base: Checkpoint, name: str) -> Iterator[NDArray[np.uint16]]:
    for words, theirs in zip(_words(model, name), _words(base, name), strict=True):
        yield differences(words, theirs)


def _checksum(array: NDArray[Any]) -> int:
    return zlib.crc32(np.ascontiguousarray(array).view(np.uint8).data)


@dataclass(frozen=True)
class RestoredMatrix:
    """A matrix that a folder of differences and their base make together.

    Attributes:
        name, dtype, shape: of the tensor.
        model, base: the folder and the base.
        checksum: CRC-32 of its bytes.
    """

    name: str
    dtype: str
    shape: tuple[int, int]
    model: CompressedModel
    base: Checkpoint
    checksum: int

    @property
    def parts(self) -> tuple[str, str]:
        """The names of the bytes of its differences, and of the list of the others, which may be absent."""
        return self.name + NEAR, self.name + FAR

    def chunks(self, pool: _core.ThreadPool) -> Iterator[NDArray[Any]]:
        """Its rows, in consecutive runs.

        Raises:
            CorruptStreamError: bytes differ from their checksum.
        """
        near, far = self.parts
        self.model.check_checksum(near)
        matrix = matrix_of(self.model, near)
        numbers = self._far(far)
        checksum = begin = used = 0
        for theirs in _words(self.base, self.name):
            end = begin + len(theirs)
            found = matrix.original(begin, end, pool).view(np.uint8).astype(np.uint16)
            is_far = found == _FIRST_FAR
            count = int(is_far.sum())
            if used + count > len(numbers):
                raise self._corrupt(f"{far} has {len(numbers)} numbers, fewer than there are far differences")
            found[is_far] = numbers[used : used + count]
            used += count
            words = add_differences(found, theirs)
            checksum = zlib.crc32(words.view(np.uint8).data, checksum)
            begin = end
            yield words.view(DTYPES[self.dtype])
        if checksum != self.checksum:
            raise self._corrupt(f"the restored weights have CRC-32 {checksum:08x}, expected {self.checksum:08x}")
        self.model.release(near)
        self.base.release(self.name)

    def _far(self, name: str) -> NDArray[np.uint16]:
        if name not in self.model.plain:
            return np.zeros(0, np.uint16)
        self.model.check_checksum(name)
        numbers = self.model.array(name)
        if self.model.dtype(name) != _NUMBERS or numbers.ndim != 1:
            raise self._corrupt(f"{name} is {self.model.dtype(name)} {list(numbers.shape)}, not a list of {_NUMBERS}")
        with np.errstate(invalid="ignore"):  # numbers that are none of ours differ below
            found = numbers.astype(np.uint16)
        if not np.array_equal(found, numbers):
            raise self._corrupt(f"{name} has numbers that are not differences")
        return found

    def _corrupt(self, what: str) -> CorruptStreamError:
        return CorruptStreamError(f"{self.name}: {what}; {self.model.path} is damaged, compress or fetch it again")


def restored_matrices(model: CompressedModel, base: Checkpoint) -> Mapping[str, RestoredMatrix]:
    """The matrices of a folder of differences, by the name of the tensor.

    Args:
        model: the folder, opened with `restores`.
        base: the checkpoint that it was compressed with.
    Raises:
        FormatError: the folder holds no differences, or the base is another one.
    """
    path = model.path / layout.DIFFERENCE_NAME
    if not path.is_file():
        raise FormatError(f"{model.path} holds no differences; export it without a base")
    stored = parse_json_object(path, path.read_bytes(), "the differences").get("matrices")
    if not isinstance(stored, dict) or not all(_is_described(fields) for fields in stored.values()):
        raise FormatError(f"{path}: expected matrices, each with {', '.join(sorted(_KEYS))}")
    found = {}
    for name, fields in stored.items():
        spec = model.specs.get(name + NEAR)
        if spec is None or spec.kind != LosslessKind(_BYTES) or fields["dtype"] not in _TYPES:
            raise FormatError(f"{path}: {name!r} has no differences in {model.path}")
        shape = spec.rows, spec.columns
        theirs = base.tensors.get(name)
        if theirs is None or (theirs.dtype, theirs.shape) != (fields["dtype"], shape) or name in base.imported:
            raise FormatError(f"{base.path} is not the base of {model.path}: it has no {name!r} of its type and shape")
        if (checksum := _checksum(base.array(name))) != fields["base_crc32"]:
            raise FormatError(
                f"{base.path} is not the base of {model.path}: its {name!r} has CRC-32 {checksum:08x}, expected "
                f"{fields['base_crc32']:08x}"
            )
        found[name] = RestoredMatrix(name, fields["dtype"], shape, model, base, fields["crc32"])
    return found


def _is_described(fields: Any) -> bool:
    return (
        isinstance(fields, dict)
        and fields.keys() == _KEYS
        and type(fields["base_crc32"]) is int
        and type(fields["crc32"]) is int
    )
