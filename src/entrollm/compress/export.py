"""Decode a compressed folder back to an ordinary checkpoint."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from entrollm import _core
from entrollm.checkpoint.model_folder import Checkpoint
from entrollm.checkpoint.side_files import side_files
from entrollm.compress.difference import restored_matrices
from entrollm.compress.folder import OutputFolder, remove_marker, write_index
from entrollm.compress.stacks import find_stacks, is_transposed
from entrollm.errors import FormatError
from entrollm.files.dtypes import DTYPES
from entrollm.format import layout
from entrollm.format.reader import CompressedModel
from entrollm.format.writer import ShardWriter
from entrollm.matrix import matrix_of

ExportType = Literal["original", "bf16", "f16", "f32"]

_DTYPES = {"bf16": "BF16", "f16": "F16", "f32": "F32"}
_TORCH_NAMES = {"bf16": "bfloat16", "f16": "float16", "f32": "float32"}
_SHARD_BYTES = 4 << 30
_CHUNK_WEIGHTS = 1 << 22


@dataclass(frozen=True, slots=True)
class ExportResult:
    """An exported checkpoint: its folder, its number of weights, and the size of its weight files."""

    path: Path
    weights: int
    file_bytes: int

    def to_json(self) -> dict[str, Any]:
        """All fields, the path as text."""
        return {**asdict(self), "path": str(self.path)}


def export(
    model: CompressedModel,
    out: str | Path,
    pool: _core.ThreadPool,
    dtype: ExportType = "original",
    on_progress: Callable[[float, float], None] | None = None,
    base: Checkpoint | None = None,
) -> ExportResult:
    """Write the dequantized weights as a checkpoint that any Hugging Face tool reads.

    Args:
        model: the folder to decode.
        out: the folder to make; it appears when it is complete.
        pool: threads to decode on.
        dtype: the type of the decoded matrices; "original" is the type that each had before compression. f32 holds
            the dequantized values exactly, the others round them.
        on_progress: called with the weights that are done and all weights.
        base: what the folder's differences are to; `None` if it holds none.
    Raises:
        FormatError: a matrix is malformed, differs from its checksum or does not decode.
        ValueError: `out` exists, or the dtype is unknown.
        OSError: writing failed.
    """
    if dtype != "original" and dtype not in _DTYPES:
        raise ValueError(f"dtype must be original, {', '.join(_DTYPES)}; found {dtype!r}")
    if base is not None and dtype != "original":
        raise ValueError(f"differences are restored to the original types, not to {dtype}")
    restored = {} if base is None else restored_matrices(model, base)
    parts = {part for matrix in restored.values() for part in matrix.parts}
    members = {name: own for name, own in _members(model).items() if name not in parts}
    types = {name: _type(model, name, own, dtype) for name, own in members.items()}
    shapes = {name: _shape(model, name, own) for name, own in members.items()}
    types |= {name: matrix.dtype for name, matrix in restored.items()}
    shapes |= {name: matrix.shape for name, matrix in restored.items()}
    sizes = {name: int(np.prod(shapes[name])) for name in shapes}
    shards = _plan_shards({name: sizes[name] * DTYPES[types[name]].itemsize for name in shapes})
    total, done = sum(sizes.values()), 0
    _check_new(Path(out))
    folder = OutputFolder(Path(out), {"export": str(model.path), "dtype": dtype}, overwrite=False)
    names: dict[str, str] = {}
    file_bytes = 0
    try:
        for index, shard in enumerate(shards):
            path = folder.partial / layout.shard_name(index, len(shards))
            with ShardWriter(path, ordinary=True) as writer:
                for name in shard:
                    own = (_chunks(model, member, types[name], pool) for member in members.get(name, ()))
                    chunks = restored[name].chunks(pool) if name in restored else itertools.chain.from_iterable(own)
                    writer.add_plain(name, types[name], shapes[name], chunks)
                    names[name] = path.name
                    done += sizes[name]
                    if on_progress is not None:
                        on_progress(done, total)
            file_bytes += path.stat().st_size
        _write_small_files(model, folder, dtype)
        if len(shards) > 1:
            write_index(folder, names, file_bytes)
        folder.publish()
    finally:
        folder.close()
    return ExportResult(Path(out), total, file_bytes)


def _check_new(out: Path) -> None:
    """Refuse a folder that exists; an export replaces nothing."""
    if out.is_dir() and any(out.iterdir()):
        remove_marker(out)
        raise ValueError(f"{out} exists and is not empty; name a folder that does not exist yet")


def _members(model: CompressedModel) -> dict[str, list[str]]:
    """The tensors of the checkpoint, each with what it is made of: itself, or the matrices of a stack."""
    # Experts of GGUF files that keep their type are matrices of a stack, too.
    kept = (name for name in model.plain if layout.is_kept_member(name) and model.array(name).ndim == 2)
    stacks = find_stacks((*model.specs, *kept))
    stack_of = {member: stack for stack, members in stacks.items() for member in members}
    members = {}
    for name in (*model.specs, *model.plain):
        if name in stack_of:
            members[stack_of[name]] = stacks[stack_of[name]]
        else:
            members[layout.transposed_matrix(name) or name] = [name]
    return members


def _type(model: CompressedModel, name: str, members: list[str], dtype: ExportType) -> str:
    """The type of a tensor; that of the coded matrices where a stack has kept ones, too."""
    coded = [member for member in members if member in model.specs]
    if coded:
        return _DTYPES.get(dtype, model.specs[coded[0]].dtype)
    found = {model.dtype(member) for member in members}
    if len(found) > 1:
        raise FormatError(f"{name}: its matrices have different types, {sorted(found)}; compress the model again")
    return found.pop()


def _shape(model: CompressedModel, name: str, members: list[str]) -> tuple[int, ...]:
    if members == [name] and name not in model.specs:
        return model.array(name).shape
    found = {_matrix_shape(model, member) for member in members}
    if len(found) > 1:
        raise FormatError(f"{name}: its matrices have different shapes, {sorted(found)}")
    if members == [name]:
        return found.pop()
    rows, columns = found.pop()
    if layout.transposed_matrix(members[0]) == name:
        return columns, rows
    return (len(members), columns, rows) if is_transposed(members) else (len(members), rows, columns)


def _matrix_shape(model: CompressedModel, name: str) -> tuple[int, ...]:
    spec = model.specs.get(name)
    return model.array(name).shape if spec is None else (spec.rows, spec.columns)


def _plan_shards(sizes: dict[str, int]) -> list[list[str]]:
    shards: list[list[str]] = [[]]
    size = 0
    for name, tensor_bytes in sizes.items():
        if shards[-1] and size + tensor_bytes > _SHARD_BYTES:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += tensor_bytes
    return shards


def _chunks(model: CompressedModel, name: str, dtype: str, pool: _core.ThreadPool) -> Iterator[NDArray[Any]]:
    model.check_checksum(name)
    if name not in model.specs:
        array = model.array(name)
        is_turned = layout.is_transposed(name) and array.ndim == 2
        yield np.ascontiguousarray(array.astype(DTYPES[dtype], copy=False).T) if is_turned else array
    elif layout.is_transposed(name):
        matrix = matrix_of(model, name)
        if matrix.lossless is not None and dtype == matrix.spec.dtype:
            weights = matrix.original(0, matrix.spec.rows, pool)
        else:
            weights = matrix.dequantize(np.arange(matrix.spec.rows, dtype=np.int64), pool).astype(DTYPES[dtype])
        yield np.ascontiguousarray(weights.T)
    else:
        matrix = matrix_of(model, name)
        step = max(1, _CHUNK_WEIGHTS // matrix.spec.columns)
        for begin in range(0, matrix.spec.rows, step):
            end = min(matrix.spec.rows, begin + step)
            if matrix.lossless is not None and dtype == matrix.spec.dtype:
                yield matrix.original(begin, end, pool)
                continue
            rows = np.arange(begin, end, dtype=np.int64)
            yield matrix.dequantize(rows, pool).astype(DTYPES[dtype])
    model.release(name)


def _write_small_files(model: CompressedModel, folder: OutputFolder, dtype: ExportType) -> None:
    config = {key: value for key, value in model.config.items() if key != "quantization_config"}
    if dtype in _TORCH_NAMES:
        config.pop("torch_dtype", None)
        config["dtype"] = _TORCH_NAMES[dtype]
    folder.write_text("config.json", json.dumps(config, indent=2) + "\n")
    for file in side_files(model.path):
        name = file.relative_to(model.path)
        if name not in (Path("config.json"), Path(layout.DIFFERENCE_NAME)):
            folder.write_bytes(name.as_posix(), file.read_bytes())
