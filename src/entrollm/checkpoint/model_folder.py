"""Read a Hugging Face checkpoint folder: its config, its tensors one at a time, and the files beside them."""

import functools
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from entrollm.checkpoint.fp8 import FP8_DTYPES, SCALE_DTYPES, BlockScales, find_scales, read_scales
from entrollm.checkpoint.gguf_model import open_gguf_model
from entrollm.checkpoint.imported import FORMATS, ImportedMatrix, ImportedWeights, find_format, fp8_matrix
from entrollm.checkpoint.names import NamedTensors, RenamedFile, canonical_names
from entrollm.checkpoint.quantization import check_fp8, check_integers, find_description
from entrollm.checkpoint.side_files import side_files
from entrollm.errors import FormatError, Message, Option, UnsupportedError
from entrollm.files.contents import check_contents
from entrollm.files.dtypes import to_float32
from entrollm.files.safetensors import Entry, parse_json_object
from entrollm.files.shards import is_gguf, open_weight_files

_CONFIG = "config.json"
_FLOAT_DTYPES = FP8_DTYPES | {"F16", "BF16", "F32", "F64"}
_DIRECT_DTYPES = {"F16", "BF16", "F32"}


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor of a checkpoint.

    Attributes:
        name, shape: the tensor.
        dtype: its type by its safetensors name; of an imported matrix, the type that it dequantizes to.
        file: the file that holds it, or the first of its sources.
        size_bytes: what it takes in the checkpoint.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    size_bytes: int

    @property
    def weights(self) -> int:
        """The number of its elements."""
        return math.prod(self.shape)


class Checkpoint:
    """A checkpoint that is read one tensor or a range of rows at a time; made by `Checkpoint.open`.

    Tensors of a decoder have their names in a causal model, whatever prefix the files give them; see
    `names.canonical_names`.

    Attributes:
        path, config, files: the folder, its config.json, and its weight files.
        tensors: all tensors by name. An imported matrix has the name that its weights have in an ordinary checkpoint.
        entries: all tensors of the files by name, sources of imported matrices included.
        quantization: the format of a quantized checkpoint; None if it is not quantized.
        imported: the imported matrices, by name.
        fp8: the matrices of fp8 with scales, by name. Their bytes can be taken over too, though they are also read as
            ordinary numbers.
    """

    def __init__(self, path: Path, config: dict[str, Any], files: Mapping[str, NamedTensors]) -> None:
        self.path = path
        self.config = config
        self.files = tuple(file.path for file in files.values())
        files = _rename(path, config, files)
        self._files = {name: file for file in files.values() for name in file.tensors}
        self._members: dict[str, tuple[str, int]] = {}
        entries = {name: file.tensors[name] for file in files.values() for name in file.tensors}
        scale_names, consumed = find_scales({name: entry.dtype for name, entry in entries.items()})
        self._scale_names = scale_names
        self._scales: dict[str, BlockScales] = {}
        for scale_name in scale_names.values():
            if entries[scale_name].dtype not in SCALE_DTYPES:
                raise FormatError(
                    f"scale tensor {scale_name!r} has dtype {entries[scale_name].dtype}, expected a float"
                )
        self.entries: Mapping[str, Entry] = MappingProxyType(entries)
        self.quantization = find_format(config.get("quantization_config") or {})
        self.imported = self._find_imported()
        read = {source for matrix in self.imported.values() for source in matrix.sources}
        check_fp8(path, config, {name: entry for name, entry in entries.items() if name not in read}, scale_names)
        self.fp8 = self._find_fp8()
        if self.fp8 and self.quantization is None:
            self.quantization = "fp8"
        self._last_read: tuple[str, ImportedWeights] | None = None
        self.tensors = self._describe(consumed)

    @classmethod
    def open(cls, path: str | Path) -> Self:
        """Open a GGUF file, or a folder with config.json and model.safetensors, or shards and their index.

        Raises:
            FormatError: the folder, a shard or the index is malformed; the message names the file.
            UnsupportedError: the weights are PyTorch pickles, or quantized by a method that is not supported.
            ValueError: the path is not a folder or a GGUF file.
        """
        path = Path(path)
        if is_gguf(path):
            return cls(path, *open_gguf_model(path))
        if not path.is_dir():
            what = "a file" if path.exists() else "missing"
            raise ValueError(f"{path} is {what}; a checkpoint is a folder with config.json and safetensors files")
        config_path = path / _CONFIG
        if not config_path.is_file():
            check_contents(path, f"{path} has no {_CONFIG}; it")
            raise FormatError(f"{path} has no {_CONFIG}; a checkpoint is a folder as save_pretrained writes it")
        config = parse_json_object(config_path, config_path.read_bytes(), "the configuration")
        return cls(path, find_description(config_path, config), open_weight_files(path))

    def read(self, name: str, start: int = 0, stop: int | None = None) -> NDArray[Any]:
        """Rows [start, stop) of a tensor as a read-only view of the file, in its own type, without fp8 scales.

        Args:
            name: a tensor that is not imported.
            start, stop: rows of the first axis; by default all. A scalar has no rows and is read whole.
        Raises:
            KeyError: the checkpoint has no such tensor.
            ValueError: the rows are outside the tensor.
        """
        if name not in self.tensors or name in self.imported:
            raise KeyError(name)
        array = self.array(name)
        if start == 0 and stop is None:
            return array
        return array[_row_range(name, array.shape[0] if array.ndim else 0, start, stop)]

    def read_float32(self, name: str, start: int = 0, stop: int | None = None) -> NDArray[np.float32]:
        """Rows [start, stop) of a tensor as a new float32 array, with fp8 scales applied.

        Raises:
            KeyError, ValueError: as for `read`.
            FormatError: an fp8 weight's scales do not fit its shape, or a float64 number exceeds float32.
            UnsupportedError: the tensor is not of a floating type.
        """
        if name in self.imported:
            found = self.read_imported(name)
            picked = _row_range(name, len(found.symbols), start, stop)
            return found.groups.apply(found.symbols[picked].astype(np.float32), picked)
        rows = self.read(name, start, stop)
        dtype = self.tensors[name].dtype
        if dtype not in _FLOAT_DTYPES:
            raise UnsupportedError(f"tensor {name!r} is {dtype}; expected one of {', '.join(sorted(_FLOAT_DTYPES))}")
        values = to_float32(rows)
        if dtype == "F64" and (beyond := np.isinf(values) & np.isfinite(rows)).any():
            place = tuple(int(axis) for axis in np.argwhere(beyond)[0])
            raise FormatError(
                f"tensor {name!r} is float64 and has {rows[place]} in row {start + place[0] if place else 0}, beyond "
                "float32",
                hint=Message("leave it in its type with {}", Option("keep", [name])),
            )
        if name in self._scale_names:
            columns = math.prod(values.shape[1:])
            self._block_scales(name).apply(values.reshape(values.shape[0], columns), start)
        return values

    def read_weights(self, name: str, start: int = 0, stop: int | None = None) -> NDArray[Any]:
        """Rows [start, stop) of a tensor in the shortest way: a view in its own type if that is bfloat16, float16 or
        float32, else as `read_float32` returns them.

        Errors as for `read_float32`.
        """
        is_direct = name not in self.imported and self.tensors[name].dtype in _DIRECT_DTYPES
        return self.read(name, start, stop) if is_direct else self.read_float32(name, start, stop)

    def read_imported(self, name: str) -> ImportedWeights:
        """The integers and scales of a matrix of `imported` or `fp8`.

        The last matrix is kept in memory, since matrices are often read a few rows at a time.

        Raises:
            KeyError: there is no such matrix.
            FormatError: its sources are malformed; the message names the tensor.
        """
        if self._last_read is None or self._last_read[0] != name:
            self._last_read = None  # frees memory for the next matrix
            self._last_read = (name, (self.imported.get(name) or self.fp8[name]).read())
        return self._last_read[1]

    def array(self, name: str) -> NDArray[Any]:
        """A read-only view of a tensor of the files, or of a matrix of a stack.

        Raises:
            KeyError: there is no such tensor.
        """
        if name in self._members:
            stack, index = self._members[name]
            member: NDArray[Any] = self._files[stack].array(stack)[index]
            return member
        return self._files[name].array(name)

    def file_bytes(self) -> int:
        """Bytes of all weight files, headers included."""
        return sum(path.stat().st_size for path in self.files)

    def has_scales(self, name: str) -> bool:
        """Whether a tensor is fp8 with scales, so that only `read_float32` returns its values."""
        return name in self._scale_names

    def are_equal(self, first: str, second: str) -> bool:
        """Whether two tensors have the same type and the same values, bit for bit.

        Raises:
            KeyError: the checkpoint lacks one of them.
        """
        if first in self.imported or second in self.imported:
            return False
        ours, theirs = self.read(first), self.read(second)
        return ours.dtype == theirs.dtype and ours.shape == theirs.shape and ours.tobytes() == theirs.tobytes()

    def plain_dtype(self, name: str) -> str:
        """The type of a tensor that is not coded: its own, but BF16 for fp8 with scales, which belong together."""
        return "BF16" if self.has_scales(name) else self.tensors[name].dtype

    def release(self, name: str) -> None:
        """Tell the system that a tensor's pages need not stay resident; views stay valid."""
        if self._last_read is not None and self._last_read[0] == name:
            self._last_read = None
        stored = self._members[name][0] if name in self._members else name
        for source in self.imported[stored].sources if stored in self.imported else (stored,):
            self._files[source].release(source)

    def split(self, stacks: Mapping[str, Sequence[str]]) -> None:
        """List tensors of three axes as matrices with names of their own.

        Args:
            stacks: the names of the matrices of each tensor, by the name of the tensor.
        Raises:
            FormatError: a tensor has another number of matrices, or a matrix has the name of another tensor.
            UnsupportedError: a tensor is not of a plain floating type.
        """
        tensors: dict[str, TensorInfo] = {}
        for name, info in self.tensors.items():
            if name not in stacks:
                tensors[name] = info
                continue
            if info.dtype in FP8_DTYPES or info.dtype not in _FLOAT_DTYPES:
                raise UnsupportedError(
                    f"tensor {name!r} is {info.dtype} of three axes, which is not coded",
                    hint=Message("keep it in its type with {}", Option("keep", [name])),
                )
            if len(stacks[name]) != info.shape[0]:
                raise FormatError(f"{self.path}: {name!r} has {info.shape[0]} matrices, not {len(stacks[name])}")
            size = info.size_bytes // info.shape[0]
            for index, member in enumerate(stacks[name]):
                if member in self.tensors:
                    raise FormatError(
                        f"{self.path}: matrix {index} of {name!r} has the name of another tensor, {member!r}"
                    )
                tensors[member] = TensorInfo(member, info.dtype, info.shape[1:], info.file, size)
                self._members[member] = (name, index)
        self.tensors = MappingProxyType(tensors)

    def check_integers(self, kept: tuple[str, ...] = ()) -> None:
        """Refuse integers where weights belong, unless a glob of `kept` matches their name.

        Raises:
            UnsupportedError: there are some, and config.json does not describe them.
        """
        plain = {name: (info.dtype, info.shape) for name, info in self.tensors.items() if name not in self.imported}
        check_integers(self.path, plain, kept)

    def side_files(self) -> tuple[Path, ...]:
        """The files besides the weights that a derived model must carry, as `side_files.side_files` lists them.

        Raises:
            FormatError: one of them is a link out of the checkpoint.
        """
        return side_files(self.path)

    def close(self) -> None:
        """Close every file; views stay valid."""
        for file in self._files.values():
            file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _find_imported(self) -> Mapping[str, ImportedMatrix]:
        if self.quantization is None:
            return MappingProxyType({})
        try:
            found = list(FORMATS[self.quantization].matrices(self.config["quantization_config"], self))
        except UnsupportedError as error:
            hint = Message("use the original checkpoint")
            raise UnsupportedError(f"{self.path}: {error.message}", hint=hint) from None
        imported: dict[str, ImportedMatrix] = {}
        for matrix in found:
            if matrix.name in imported or (matrix.name in self.entries and matrix.name not in matrix.sources):
                raise FormatError(f"{self.path}: {matrix.name!r} is stored twice, quantized and plain")
            imported[matrix.name] = matrix
        if not imported:
            raise FormatError(f"{self.path}: config.json declares {self.quantization} weights, but there are none")
        return MappingProxyType(imported)

    def _find_fp8(self) -> Mapping[str, ImportedMatrix]:
        found = {}
        for name, scale_name in self._scale_names.items():
            shape = self.entries[name].shape
            if len(shape) == 2 and 0 not in shape:
                scales = functools.partial(self._block_scales, name)
                found[name] = fp8_matrix(name, scale_name, self, scales)
        return MappingProxyType(found)

    def _describe(self, consumed: frozenset[str]) -> Mapping[str, TensorInfo]:
        """All tensors; an imported matrix comes where its first source does. Some share their sources."""
        position = {name: number for number, name in enumerate(self.entries)}
        first: dict[str, list[ImportedMatrix]] = {}
        for matrix in self.imported.values():
            first.setdefault(min(matrix.sources, key=position.__getitem__), []).append(matrix)
        uses = Counter(source for matrix in self.imported.values() for source in matrix.sources)
        consumed |= uses.keys()
        tensors = {}
        for name, entry in self.entries.items():
            file = self._files[name].path
            for matrix in first.get(name, ()):
                size_bytes = sum(self.entries[source].size_bytes // uses[source] for source in matrix.sources)
                tensors[matrix.name] = TensorInfo(matrix.name, matrix.dtype, matrix.shape, file, size_bytes)
            if name not in consumed:
                tensors[name] = TensorInfo(name, entry.dtype, entry.shape, file, entry.size_bytes)
        return MappingProxyType(tensors)

    def _block_scales(self, name: str) -> BlockScales:
        """The scales of an fp8 weight that has scales."""
        if name not in self._scales:
            quantization = self.config.get("quantization_config") or {}
            scale = self.array(self._scale_names[name])
            block_shape = quantization.get("weight_block_size")
            self._scales[name] = read_scales(name, self.tensors[name].shape, scale, block_shape)
        return self._scales[name]


def _rename(path: Path, config: Mapping[str, Any], files: Mapping[str, NamedTensors]) -> Mapping[str, NamedTensors]:
    """The files with the names that a causal model has."""
    stored = [name for file in files.values() for name in file.tensors]
    try:
        names = canonical_names(stored, is_tied=config.get("tie_word_embeddings") is True)
    except FormatError as error:
        raise FormatError(f"{path}: {error}") from None
    if all(name == theirs for name, theirs in names.items()):
        return files
    return {key: RenamedFile(file, names) for key, file in files.items()}


def _row_range(name: str, rows: int, start: int, stop: int | None) -> slice:
    stop = rows if stop is None else stop
    if not 0 <= start <= stop <= rows:
        raise ValueError(f"tensor {name!r} has {rows} rows; [{start}, {stop}) is outside of them")
    return slice(start, stop)
