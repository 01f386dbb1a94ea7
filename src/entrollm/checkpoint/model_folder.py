"""A Hugging Face checkpoint folder: its config, its tensors one at a time, and the files beside them."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from entrollm.checkpoint.safetensors_file import Entry, SafetensorsFile, open_safetensors, parse_json_object
from entrollm.checkpoint.scales import FP8_DTYPES, SCALE_DTYPES, BlockScales, find_scales, read_scales, to_float32
from entrollm.errors import FormatError, UnsupportedError

_CONFIG = "config.json"
_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_SHARD_PATTERN = re.compile(r"model-\d+-of-\d+\.safetensors")
_FP8_METHODS = frozenset({"fp8", "fbgemm_fp8"})
_FLOAT_DTYPES = FP8_DTYPES | {"F16", "BF16", "F32", "F64"}

_SIDE_FILES = frozenset(
    {
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "tokenizer.model",
        "special_tokens_map.json",
        "added_tokens.json",
        "vocab.json",
        "vocab.txt",
        "merges.txt",
        "chat_template.jinja",
        "chat_template.json",
    }
)
_LICENCE_PATTERN = re.compile(r"(licen[cs]e|notice|copying|use_policy)([-_. ].*)?", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor of a checkpoint; `begin` and `end` are byte offsets in `file`, `dtype` is safetensors' name."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    begin: int
    end: int

    @property
    def size_bytes(self) -> int:
        """Bytes that the tensor takes in the checkpoint."""
        return self.end - self.begin


class Checkpoint:
    """A checkpoint folder, read one tensor or a range of rows at a time; make it with `Checkpoint.open`."""

    def __init__(self, path: Path, config: dict[str, Any], files: Mapping[str, SafetensorsFile]) -> None:
        self.path = path
        self.config = config
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
        self.tensors: Mapping[str, TensorInfo] = MappingProxyType(
            {
                name: _describe(name, entry, self._files[name].path)
                for name, entry in entries.items()
                if name not in consumed
            }
        )

    @classmethod
    def open(cls, path: str | Path) -> Self:
        """Open a folder with config.json and model.safetensors, or shards and their index.

        Raises:
            FormatError: the folder, a shard or the index is malformed; the message names the file.
            UnsupportedError: the weights are PyTorch pickles or quantized by a method that is not read here.
            ValueError: the path is not a folder.
        """
        path = Path(path)
        if not path.is_dir():
            what = "a file" if path.exists() else "missing"
            raise ValueError(f"{path} is {what}; a checkpoint is a folder with config.json and safetensors files")
        config_path = path / _CONFIG
        if not config_path.is_file():
            raise FormatError(f"{path} has no {_CONFIG}; a checkpoint is a folder as save_pretrained writes it")
        config = parse_json_object(config_path, config_path.read_bytes(), "the configuration")
        _check_quantization(config_path, config.get("quantization_config"))
        return cls(path, config, open_weight_files(path))

    def read(self, name: str, start: int = 0, stop: int | None = None) -> NDArray[Any]:
        """Return rows [start, stop) of a tensor as a read-only view of the file: its own dtype, fp8 scales not applied.

        Args:
            name: a name of `tensors`.
            start, stop: rows of the first axis; by default all. A scalar has no rows and is read whole.
        Raises:
            KeyError: the checkpoint has no such tensor.
            ValueError: the rows are outside the tensor.
        """
        if name not in self.tensors:
            raise KeyError(name)
        array = self._array(name)
        if start == 0 and stop is None:
            return array
        rows = array.shape[0] if array.ndim else 0
        stop = rows if stop is None else stop
        if not 0 <= start <= stop <= rows:
            raise ValueError(f"tensor {name!r} has {rows} rows; [{start}, {stop}) is outside of them")
        return array[start:stop]

    def read_float32(self, name: str, start: int = 0, stop: int | None = None) -> NDArray[np.float32]:
        """Return rows [start, stop) as a new float32 array, fp8 scales applied.

        Raises:
            KeyError, ValueError: as for `read`.
            FormatError: an fp8 weight's scales do not fit its shape.
            UnsupportedError: the tensor is not of a floating type.
        """
        rows = self.read(name, start, stop)
        dtype = self.tensors[name].dtype
        if dtype not in _FLOAT_DTYPES:
            raise UnsupportedError(f"tensor {name!r} is {dtype}; expected one of {', '.join(sorted(_FLOAT_DTYPES))}")
        values = to_float32(rows)
        scales = self._find_scales(name)
        if scales is not None:
            columns = math.prod(values.shape[1:])
            scales.apply(values.reshape(values.shape[0], columns), start)
        return values

    def has_scales(self, name: str) -> bool:
        """Whether a tensor is fp8 with scales, so that only `read_float32` gives its values."""
        return name in self._scale_names

    def release(self, name: str) -> None:
        """Tell the system that a tensor has been used; its pages leave resident memory, views stay valid."""
        stored = self._members[name][0] if name in self._members else name
        self._files[stored].release(stored)

    def split(self, stacks: Mapping[str, Sequence[str]]) -> None:
        """Show tensors of three axes as their matrices, under names of their own.

        Args:
            stacks: the names of the matrices, by that of the tensor.
        Raises:
            FormatError: a tensor has another number of matrices, or another tensor the name of one.
            UnsupportedError: a tensor is not of a plain floating type.
        """
        tensors: dict[str, TensorInfo] = {}
        for name, info in self.tensors.items():
            if name not in stacks:
                tensors[name] = info
                continue
            if info.dtype in FP8_DTYPES or info.dtype not in _FLOAT_DTYPES:
                raise UnsupportedError(
                    f"tensor {name!r} is {info.dtype} of three axes, which is not coded; keep it in its type (--keep)"
                )
            if len(stacks[name]) != info.shape[0]:
                raise FormatError(f"{self.path}: {name!r} has {info.shape[0]} matrices, not {len(stacks[name])}")
            size = info.size_bytes // info.shape[0]
            for index, member in enumerate(stacks[name]):
                if member in self.tensors:
                    raise FormatError(
                        f"{self.path}: matrix {index} of {name!r} has the name of another tensor, {member!r}"
                    )
                begin = info.begin + index * size
                tensors[member] = TensorInfo(member, info.dtype, info.shape[1:], info.file, begin, begin + size)
                self._members[member] = (name, index)
        self.tensors = MappingProxyType(tensors)

    def _array(self, name: str) -> NDArray[Any]:
        if name in self._members:
            stack, index = self._members[name]
            member: NDArray[Any] = self._files[stack].array(stack)[index]
            return member
        return self._files[name].array(name)

    def side_files(self) -> tuple[Path, ...]:
        """List the files that a derived model must carry: configuration, tokenizer, chat template, licences.

        Raises:
            FormatError: one of them is a link that leads out of the checkpoint.
        """
        found = []
        for file in sorted(self.path.iterdir()):
            if file.name in _SIDE_FILES or _LICENCE_PATTERN.fullmatch(file.name):
                _check_link(self.path, file)
                if file.is_file():
                    found.append(file)
        return tuple(found)

    def close(self) -> None:
        """Let go of every file; views that were read stay valid."""
        for file in self._files.values():
            file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _find_scales(self, name: str) -> BlockScales | None:
        scale_name = self._scale_names.get(name)
        if scale_name is None:
            return None
        if name not in self._scales:
            quantization = self.config.get("quantization_config") or {}
            scale = self._files[scale_name].array(scale_name)
            block_shape = quantization.get("weight_block_size")
            self._scales[name] = read_scales(name, self.tensors[name].shape, scale, block_shape)
        return self._scales[name]


def _describe(name: str, entry: Entry, file: Path) -> TensorInfo:
    return TensorInfo(name, entry.dtype, entry.shape, file, entry.begin, entry.end)


def _check_quantization(config_path: Path, quantization: object) -> None:
    """Refuse checkpoints whose weights are not plain numbers or fp8."""
    if quantization is None:
        return
    if not isinstance(quantization, dict):
        raise FormatError(f"{config_path}: quantization_config must be an object, found {type(quantization).__name__}")
    method = quantization.get("quant_method")
    if method == "entrollm":
        raise UnsupportedError(
            f"{config_path.parent} is compressed already; `entrollm export` writes a checkpoint of it"
        )
    if method in _FP8_METHODS or (method == "compressed-tensors" and _stores_fp8(quantization)):
        return
    raise UnsupportedError(
        f"{config_path}: the weights are quantized by {method!r}, which is not read; "
        "use the original checkpoint, or one in bf16, f16, f32 or fp8"
    )


def _stores_fp8(quantization: dict[str, Any]) -> bool:
    groups = quantization.get("config_groups")
    if not isinstance(groups, dict) or not groups:
        return bool(quantization.get("format") == "float-quantized")
    schemes = [group.get("weights") if isinstance(group, dict) else None for group in groups.values()]
    return all(
        isinstance(scheme, dict) and scheme.get("type") == "float" and scheme.get("num_bits") == 8 for scheme in schemes
    )


def open_weight_files(path: Path) -> dict[str, SafetensorsFile]:
    """Open the checkpoint's one file, or every shard that its index names."""
    index_path, single_path = path / _INDEX, path / _SINGLE
    if index_path.is_file():
        weight_map = _read_index(index_path)
        if single_path.is_file() and _SINGLE not in weight_map.values():
            raise FormatError(f"{path} has {_SINGLE} and an index that does not name it; remove the one that is stale")
        return _open_shards(path, weight_map)
    if single_path.is_file():
        return {_SINGLE: open_safetensors(single_path)}
    present = sorted(file.name for file in path.iterdir())
    if any(name.endswith(".safetensors") for name in present):
        shards = ", ".join(name for name in present if name.endswith(".safetensors"))
        raise FormatError(f"{path} has neither {_SINGLE} nor {_INDEX}, only {shards}; fetch the index as well")
    pickles = [name for name in present if name.endswith((".bin", ".pth", ".pt"))]
    if pickles:
        raise UnsupportedError(
            f"{path} holds PyTorch pickles ({pickles[0]}), which can run code when they are read; convert them to "
            "safetensors: load with transformers and call save_pretrained"
        )
    raise FormatError(f"{path} has no weights: expected {_SINGLE}, or {_INDEX} and its shards")


def _read_index(index_path: Path) -> dict[str, str]:
    """Return the index's map from tensor to shard."""
    weight_map = parse_json_object(index_path, index_path.read_bytes(), "the index").get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise FormatError(f"{index_path}: weight_map must be an object that maps tensors to shards")
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or not shard.endswith(".safetensors") or Path(shard).name != shard:
            raise FormatError(f"{index_path}: tensor {name!r} is in {shard!r}, expected a .safetensors file's name")
    return weight_map


def _open_shards(path: Path, weight_map: dict[str, str]) -> dict[str, SafetensorsFile]:
    shards = sorted(set(weight_map.values()))
    missing = [shard for shard in shards if not (path / shard).is_file()]
    if missing:
        raise FormatError(f"{path}: shard {missing[0]} is missing, though the index names it; fetch it")
    stray = sorted(
        file.name for file in path.iterdir() if _SHARD_PATTERN.fullmatch(file.name) and file.name not in shards
    )
    if stray:
        raise FormatError(f"{path}: shard {stray[0]} is not in {_INDEX}; remove it, or fetch the index again")
    files = {shard: open_safetensors(path / shard) for shard in shards}
    owners: dict[str, str] = {}
    for shard, file in files.items():
        for name in file.tensors:
            if name in owners:
                raise FormatError(f"{path}: tensor {name!r} is in two shards, {owners[name]} and {shard}")
            owners[name] = shard
            if name not in weight_map:
                raise FormatError(f"{path}: tensor {name!r} of {shard} is not in {_INDEX}; fetch the index again")
    for name, shard in weight_map.items():
        if owners.get(name) != shard:
            found = f"it is in {owners[name]}" if name in owners else "no shard has it"
            raise FormatError(f"{path}: the index places tensor {name!r} in {shard}, but {found}; fetch both again")
    return files


def _check_link(folder: Path, file: Path) -> None:
    """Refuse a link out of the folder; the Hub's cache may link from snapshots/<revision> to its own blobs."""
    if not file.is_symlink():
        return
    target = file.resolve()
    allowed = [folder.resolve()]
    if folder.resolve().parent.name == "snapshots":
        allowed.append(folder.resolve().parent.parent / "blobs")
    if not any(target.is_relative_to(root) for root in allowed):
        raise FormatError(f"{file} is a link to {target}, outside of the checkpoint; put the file in its place")
