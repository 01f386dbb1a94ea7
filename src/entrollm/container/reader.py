"""Open a compressed model folder: every structure is checked once here, code bytes stay in the memory map."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from entrollm import _core
from entrollm.checkpoint.safetensors_file import SafetensorsFile, parse_json_object
from entrollm.checkpoint.weight_files import open_weight_files
from entrollm.container import layout
from entrollm.container.header import parse_specs, read_tensors, versions_read
from entrollm.container.packing import unpack
from entrollm.errors import CorruptStreamError, FormatError, UnsupportedError
from entrollm.groups import GroupScales
from entrollm.scales import decode_scales, zero_offsets
from entrollm.specs import READ_VERSIONS, TensorSpec

_NO_STREAM = np.zeros(_core.SLACK_BYTES, np.uint8)
_NO_SIZES = np.zeros(0, np.uint16)
_ONE = np.ones(1, np.float32)


@dataclass(frozen=True)
class CodedMatrix:
    """A matrix that is read straight from its coded bytes.

    Attributes:
        name: the tensor's name.
        spec: what it is.
        stored_bytes: all its bytes in the file, without its share of the header.
        native: what multiplies and decodes it; where there are groups, of the integers alone.
        scale: float32, shape (1,) or (rows,); of no use where there are groups.
        offset: float32, the shape of scale; None for none.
        column_scale: float32, shape (columns,); None for none.
        groups: its group scales; None for none.
    """

    name: str
    spec: TensorSpec
    stored_bytes: int
    native: _core.CodedMatrix
    scale: NDArray[np.float32]
    offset: NDArray[np.float32] | None
    column_scale: NDArray[np.float32] | None
    groups: GroupScales | None = None

    def symbols(self, begin: int, end: int, pool: _core.ThreadPool) -> NDArray[np.uint8]:
        """Decode rows [begin, end): uint8 (end - begin, columns).

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
            values = self.native.dequantize(rows, pool)
        except _core.CorruptBlockError as error:
            raise self.corrupt(error) from None
        return values if self.groups is None else self.groups.apply(values, rows)

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
    arrays = unpack(name, spec, arrays)
    groups = _read_groups(name, spec, arrays)
    scale = _ONE if groups else _scales(name, "scale", spec, arrays)
    if scale is None:
        raise FormatError(f"{name}: neither its spec nor the entry {name + layout.SCALE!r} gives its scale")
    offset = None if groups else _offsets(name, spec, scale, arrays)
    column_scale = _scales(name, "column_scale", spec, arrays)
    try:
        native = _core.CodedMatrix(
            spec.code.program(),
            spec.code.low_bits,
            _core.Geometry(spec.rows, spec.columns, spec.blocks.rows, spec.blocks.columns),
            arrays.get(layout.DENSE, _NO_STREAM),
            arrays.get(layout.SPARSE, _NO_STREAM),
            _aligned(arrays.get(layout.SPARSE_SIZES, _NO_SIZES)),
            scale,
            offset,
            column_scale,
        )
    except ValueError as error:
        raise FormatError(f"{name}: {error}; the file is damaged or was not written by EntroLLM") from None
    return CodedMatrix(name, spec, stored_bytes, native, scale, offset, column_scale, groups)


def multiply(matrices: Sequence[CodedMatrix], x: NDArray[np.float32], pool: _core.ThreadPool) -> NDArray[np.float32]:
    """Multiply with several matrices at once: float32 (n, columns) -> float32 (n, sum of rows), side by side.

    Activations are rounded to 16 bits of each row's largest magnitude; the sums are exact, with group scales those of
    each group. There, products are of the weights before they are rounded to half precision, and sums of fp8 values are
    in double precision.

    Raises:
        CorruptStreamError: a block does not decode.
    """
    if any(matrix.groups is not None for matrix in matrices):
        return np.concatenate([_multiply_grouped(matrix, x, pool) for matrix in matrices], axis=1)
    try:
        return _core.multiply([matrix.native for matrix in matrices], np.ascontiguousarray(x), pool)
    except _core.CorruptBlockError as error:
        names = ", ".join(matrix.name for matrix in matrices)
        raise CorruptStreamError(f"{names}: {error}; the file is damaged, compress or fetch it again") from None


def _multiply_grouped(matrix: CodedMatrix, x: NDArray[np.float32], pool: _core.ThreadPool) -> NDArray[np.float32]:
    groups = matrix.groups
    if groups is None:
        return multiply([matrix], x, pool)
    order = groups.arrays.get("column_order")
    stored = np.ascontiguousarray(x if order is None else x[:, order])
    try:
        return matrix.native.multiply_groups(stored, groups.form.size, *groups.terms, pool)
    except _core.CorruptBlockError as error:
        raise matrix.corrupt(error) from None


class CompressedModel:
    """A folder written by `entrollm compress`; make it with `CompressedModel.open`."""

    def __init__(self, path: Path, config: dict[str, Any], files: Mapping[str, SafetensorsFile]) -> None:
        self.path = path
        self.config = config
        self._files: dict[str, SafetensorsFile] = {}
        self._spec_texts: dict[str, str] = {}
        specs: dict[str, TensorSpec] = {}
        plain: dict[str, int] = {}
        for file in files.values():
            coded, kept = read_tensors(file)
            specs.update(parse_specs(file, coded))
            plain.update(kept)
            self._spec_texts.update(coded)
            for name in [*coded, *file.tensors]:
                if self._files.setdefault(name, file) is not file:
                    raise FormatError(f"{path}: tensor {name!r} is in two shards")
        self.specs: Mapping[str, TensorSpec] = MappingProxyType(specs)
        self.plain = tuple(plain)
        self._plain_checksums = plain

    @classmethod
    def open(cls, path: str | Path) -> Self:
        """Open a compressed model folder.

        Raises:
            FormatError: the folder, a shard or a spec is malformed; the message names it.
            UnsupportedError: the folder was written by a newer version.
            ValueError: the path is not a folder of a compressed model.
        """
        path = Path(path)
        config = read_config(path)
        if not is_compressed(config):
            raise ValueError(f"{path} is not a compressed model; `entrollm compress {path} -o OUT` makes one")
        version = config["quantization_config"].get("version")
        if type(version) is not int or version not in READ_VERSIONS:
            raise UnsupportedError(
                f"{path / 'config.json'}: format version {version!r}; this EntroLLM reads {versions_read()}"
            )
        return cls(path, config, open_weight_files(path))

    def matrix(self, name: str) -> CodedMatrix:
        """Open one matrix, checking that its streams, blocks and code fit together.

        Raises:
            KeyError: no matrix has this name.
            FormatError: the stored entries do not match the spec.
        """
        return open_matrix(name, self.specs[name], self.stored_arrays(name))

    def unpacked_arrays(self, name: str) -> dict[str, NDArray[Any]]:
        """What a matrix consists of, by suffix, whether it is stored in one entry or in several.

        Raises:
            FormatError: the stored entries do not match the spec.
        """
        return unpack(name, self.specs[name], self.stored_arrays(name))

    def array(self, name: str) -> NDArray[Any]:
        """A tensor that was kept in its own type, as a read-only view of the file."""
        return self._files[name].array(name)

    def dtype(self, name: str) -> str:
        """The safetensors dtype of a tensor that was kept."""
        return self._files[name].tensors[name].dtype

    def stored_arrays(self, name: str) -> dict[str, NDArray[Any]]:
        """The stored entries of a matrix, by suffix.

        Raises:
            FormatError: an entry has the wrong type or nothing in it.
        """
        file = self._files[name]
        arrays = {}
        for suffix in layout.SUFFIXES:
            entry = file.tensors.get(name + suffix)
            if entry is None:
                continue
            if entry.dtype not in layout.SUFFIX_DTYPES[suffix] or len(entry.shape) != 1:
                raise FormatError(
                    f"{file.path}: {name + suffix!r} is {entry.dtype} {list(entry.shape)}, "
                    f"expected one axis of {' or '.join(layout.SUFFIX_DTYPES[suffix])}"
                )
            if entry.size_bytes <= (_core.SLACK_BYTES if suffix in layout.STREAMS else 0):
                raise FormatError(f"{file.path}: {name + suffix!r} is empty; empty entries are left out")
            arrays[suffix] = file.array(name + suffix)
        return arrays

    def check_checksum(self, name: str) -> None:
        """Compare the bytes of a matrix, or of a tensor that was kept, with their checksum.

        Raises:
            KeyError: no tensor has this name.
            CorruptStreamError: they differ.
        """
        if name in self.specs:
            expected = self.specs[name].checksum
            found = layout.checksum(name, self._spec_texts[name], self.stored_arrays(name))
        else:
            expected = self._plain_checksums[name]
            found = zlib.crc32(self.array(name).reshape(-1).view(np.uint8).data)
        if found != expected:
            raise CorruptStreamError(
                f"{self._files[name].path}: the bytes of {name!r} have CRC-32 {found:08x}, expected {expected:08x}; "
                "the file is damaged, compress or fetch it again"
            )

    def file_bytes(self) -> int:
        """Bytes of all weight files, headers included."""
        return sum(file.size_bytes for file in {id(f): f for f in self._files.values()}.values())

    def release(self, name: str) -> None:
        """Tell the system that the bytes of a matrix or a kept tensor need not stay resident."""
        file = self._files[name]
        for entry in (name, *(name + suffix for suffix in layout.SUFFIXES)):
            if entry in file.tensors:
                file.release(entry)

    def close(self) -> None:
        """Let go of the files; matrices and views stay valid."""
        for file in self._files.values():
            file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def read_config(path: Path) -> dict[str, Any]:
    """The config.json of a model folder.

    Raises:
        FormatError: it is missing or malformed.
        ValueError: the path is not a folder.
    """
    if not path.is_dir():
        raise ValueError(f"{path} is {'a file' if path.exists() else 'missing'}; expected a model folder")
    config_path = path / "config.json"
    if not config_path.is_file():
        raise FormatError(f"{path} has no config.json; expected a model folder")
    return parse_json_object(config_path, config_path.read_bytes(), "the configuration")


def is_compressed(config: Mapping[str, Any]) -> bool:
    """Whether a config.json belongs to a folder that `entrollm compress` wrote."""
    quantization = config.get("quantization_config")
    return isinstance(quantization, dict) and quantization.get("quant_method") == layout.QUANT_METHOD


def _read_groups(name: str, spec: TensorSpec, arrays: Mapping[str, NDArray[Any]]) -> GroupScales | None:
    """The group scales of a matrix, inflated and checked; None where its spec has none.

    Args:
        name: the matrix, for errors.
        spec: its spec.
        arrays: its stored entries by suffix.
    Raises:
        FormatError: the entries are not those that the spec tells of, or hold what no weight can be made of.
    """
    form = spec.groups
    expected = () if form is None else tuple("." + kind for kind in form.types)
    stray = [s for s in arrays if s in layout.GROUP_SUFFIXES and s not in expected]
    if form is not None:
        stray += [s for s in (layout.SCALE, layout.OFFSET, layout.COLUMN_SCALE) if s in arrays]
    missing = [suffix for suffix in expected if suffix not in arrays]
    if stray or missing:
        what = f"it lacks {missing[0][1:]}" if missing else f"it has {stray[0][1:]}"
        raise FormatError(f"{name}: {what}, which its spec {'tells of' if missing else 'does not tell of'}")
    if form is None:
        return None
    found = {}
    for kind, count in form.lengths(spec.rows, spec.columns).items():
        values = layout.unpack_array(f"{name}.{kind}", arrays["." + kind], form.types[kind], count)
        if values.dtype.kind not in "ui" and not np.isfinite(values.astype(np.float32)).all():
            raise FormatError(f"{name}: its {kind} has a value that is not finite")
        found[kind] = values if kind == "column_order" else values.reshape(spec.rows, -1)
    order = found.get("column_order")
    if order is not None and not np.array_equal(np.sort(order), np.arange(spec.columns, dtype=np.uint32)):
        raise FormatError(f"{name}: its column_order does not name every column once")
    return GroupScales(form, found, None if spec.zero is None else int(spec.zero))


def _offsets(
    name: str, spec: TensorSpec, scale: NDArray[np.float32], arrays: Mapping[str, NDArray[Any]]
) -> NDArray[np.float32] | None:
    """The offsets that are stored, or those that put the spec's zero at 0."""
    if spec.zero is None:
        return _scales(name, "offset", spec, arrays)
    if layout.OFFSET in arrays:
        raise FormatError(f"{name}: it has a zero symbol and stored offsets too")
    offsets = zero_offsets(scale, spec.zero)
    if not np.isfinite(offsets).all():
        raise FormatError(f"{name}: its zero gives an offset that is not finite")
    return offsets


def _scales(name: str, what: str, spec: TensorSpec, arrays: Mapping[str, NDArray[Any]]) -> NDArray[np.float32] | None:
    """One scale for the tensor from its spec, or stored ones; finite, in aligned memory."""
    value = {"scale": spec.scale, "offset": spec.offset}.get(what)
    stored = arrays.get(f".{what}")
    form = spec.scales.get(what)
    if stored is not None and isinstance(form, int):
        base = 1.0 if what == "column_scale" else value
        if base is None:
            raise FormatError(f"{name}: its {what} is stored as codes, and the spec has no {what} that they multiply")
        found = decode_scales(stored, form, base)
    elif stored is None:
        return None if value is None else np.array([value], np.float32)
    elif value is not None:
        raise FormatError(f"{name}: its {what} is both in the spec and stored")
    else:
        found = stored.astype(np.float32)  # a copy in aligned memory; safetensors only aligns what it happens to
    if not np.isfinite(found).all():
        raise FormatError(f"{name}: its {what} has a value that is not finite")
    return found


def _aligned(array: NDArray[Any]) -> NDArray[Any]:
    """A copy in aligned memory; safetensors only aligns what it happens to."""
    return np.array(array)
