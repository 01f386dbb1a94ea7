"""Write one file of a compressed model, or find that an earlier run has written it."""

from __future__ import annotations

import functools
import json
import logging
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

from numpy.typing import NDArray

from entrollm.checkpoint.model_folder import Checkpoint
from entrollm.compress.coder import MatrixCoder
from entrollm.compress.folder import OutputFolder
from entrollm.compress.planning import Plan
from entrollm.compress.progress import ProgressCounter
from entrollm.errors import FormatError
from entrollm.files.dtypes import DTYPES, check_finite
from entrollm.files.safetensors import open_safetensors, parse_json_object
from entrollm.format import layout
from entrollm.format.reader import CompressedModel
from entrollm.format.writer import ShardWriter
from entrollm.matrix import matrix_of

RECORD_VERSION = 3
"""Changes with the form of a record, so that a run does not resume one that has another form."""
_log = logging.getLogger(__name__)
_COPY_BYTES = 1 << 24


@dataclass(frozen=True, slots=True)
class MatrixRecord:
    """A matrix that was coded.

    Attributes:
        weights: how many it has.
        stored_bytes: what it takes in its file, its share of the header included, to within a few bytes.
        entropy_bits, huffman_bits: per weight, of the histogram of its symbols.
        relative_error: RMS quantization error over the RMS of the weights.
    """

    weights: int
    stored_bytes: int
    entropy_bits: float
    huffman_bits: float
    relative_error: float


@dataclass(frozen=True, slots=True)
class ShardRecord:
    """A file that is finished. It is kept as JSON beside the file until the model is complete.

    Attributes:
        file: the file's name; file_bytes, its size.
        kept_bytes: bytes of its plain tensors.
        entries: names of its entries, in order.
        matrices: its coded matrices by name, in order.
    """

    file: str
    file_bytes: int
    kept_bytes: int
    entries: tuple[str, ...]
    matrices: Mapping[str, MatrixRecord]

    @property
    def coded_weights(self) -> int:
        """Weights of its coded matrices."""
        return sum(matrix.weights for matrix in self.matrices.values())

    def to_json(self) -> str:
        """The JSON form."""
        return json.dumps(asdict(self))

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read and check the JSON form.

        Raises:
            FormatError: the file at `path` is not a record.
        """
        fields = parse_json_object(path, path.read_bytes(), "the record of a shard")
        expected = {"file": str, "file_bytes": int, "kept_bytes": int, "entries": list, "matrices": dict}
        _check_types(path, fields, expected)
        if not all(isinstance(entry, str) for entry in fields["entries"]):
            raise FormatError(f"{path}: entries must be names; remove {path.parent} to start over")
        counts = dict.fromkeys(("weights", "stored_bytes"), int)
        of_matrix = {**counts, **dict.fromkeys(("entropy_bits", "huffman_bits", "relative_error"), float)}
        for matrix in fields["matrices"].values():
            _check_types(path, matrix, of_matrix)
        return cls(
            file=fields["file"],
            file_bytes=fields["file_bytes"],
            kept_bytes=fields["kept_bytes"],
            entries=tuple(fields["entries"]),
            matrices={name: MatrixRecord(**matrix) for name, matrix in fields["matrices"].items()},
        )


def record_of(shard: Path) -> Path:
    """Where the record of a shard is kept; no file of a model is hidden."""
    return shard.with_name(f".{shard.stem}.json")


class ShardMaker:
    """Makes the shards of a plan, in their order.

    Args:
        checkpoint: the model.
        plan: what becomes of its tensors.
        coder: codes its matrices.
        folder: gets the files.
        progress: counts the weights that are finished.

    Attributes:
        resumed_weights: coded weights that an earlier run has finished.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        plan: Plan,
        coder: MatrixCoder,
        folder: OutputFolder,
        progress: ProgressCounter,
    ) -> None:
        self._checkpoint = checkpoint
        self._plan = plan
        self._coder = coder
        self._folder = folder
        self._progress = progress
        self.resumed_weights = 0

    def make(self, index: int) -> ShardRecord:
        """Write shard `index` and its record, unless they exist.

        Raises:
            FormatError: a weight is not finite, or the record of an existing shard does not fit it.
            EntroLLMError: the size that is asked for cannot be met.
        """
        path = self._folder.partial / layout.shard_name(index, len(self._plan.shards))
        names = self._plan.shards[index]
        record_path = record_of(path)
        if path.is_file() and record_path.is_file():
            record = ShardRecord.read(record_path)
            self._resume(path, record, names[0])
            return record
        record = self._write(path, names)
        self._folder.write_text(record_path.name, record.to_json())
        return record

    def _write(self, path: Path, names: tuple[str, ...]) -> ShardRecord:
        coded = frozenset(self._plan.coded)
        matrices: dict[str, MatrixRecord] = {}
        kept_bytes = 0
        with ShardWriter(path) as writer:
            for name in names:
                if name in coded:
                    result = self._coder.code(name, writer.table, functools.partial(self._progress.add, name))
                    writer.add_matrix(result.matrix)
                    matrices[name] = MatrixRecord(
                        self._checkpoint.tensors[name].weights,
                        result.stored_bytes,
                        result.entropy_bits,
                        result.huffman_bits,
                        result.matrix.spec.relative_error,
                    )
            for name in names:
                if name not in coded:
                    dtype = self._checkpoint.plain_dtype(name)
                    shape = self._checkpoint.tensors[name].shape
                    kept_bytes += writer.add_plain(name, dtype, shape, _chunks(self._checkpoint, name, dtype))
                    self._checkpoint.release(name)
        entries = tuple(entry.name for entry in writer.entries)
        return ShardRecord(path.name, path.stat().st_size, kept_bytes, entries, matrices)

    def _resume(self, path: Path, record: ShardRecord, first: str) -> None:
        """Record the matrices of a finished shard, in their order."""
        if (record.file, record.file_bytes) != (path.name, path.stat().st_size):
            raise FormatError(f"{path} is not the file of its record; remove {path.parent} to start over")
        with CompressedModel(path, {}, {path.name: open_safetensors(path)}) as model:
            for name, matrix in record.matrices.items():
                self._coder.resume(matrix_of(model, name), matrix.stored_bytes)
        self.resumed_weights += record.coded_weights
        self._progress.add(first, record.coded_weights)
        _log.info("%s is finished already", path.name)


def _check_types(path: Path, fields: Any, expected: Mapping[str, type]) -> None:
    """Check the keys of a JSON object and the types of their values."""
    if not isinstance(fields, dict) or fields.keys() != expected.keys():
        raise FormatError(f"{path}: expected the keys {', '.join(expected)}; remove {path.parent} to start over")
    for key, kind in expected.items():
        value = fields[key]
        if type(value) is not kind or (isinstance(value, int | float) and value < 0):
            raise FormatError(f"{path}: {key} is {value!r:.80}; remove {path.parent} to start over")


def _chunks(checkpoint: Checkpoint, name: str, dtype: str) -> Iterator[NDArray[Any]]:
    """A tensor in runs of rows of about 16 MB, in the type `dtype`."""
    info = checkpoint.tensors[name]
    rows = info.shape[0] if info.shape else 1
    step = max(1, _COPY_BYTES * rows // max(1, info.size_bytes))
    for begin in range(0, rows, step):
        run = (name, begin, min(rows, begin + step)) if info.shape else (name,)
        stored = checkpoint.read(*run)
        check_finite(name, stored)
        yield stored if dtype == info.dtype else checkpoint.read_float32(*run).astype(DTYPES[dtype])
