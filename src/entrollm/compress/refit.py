"""Replace the scales of a compressed folder before it is published."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from entrollm.checkpoint.model_folder import Checkpoint
from entrollm.compress.coder import relative_error
from entrollm.format.entry import join_arrays
from entrollm.format.reader import CompressedModel
from entrollm.format.spec import TensorSpec
from entrollm.format.stored import StoredMatrix
from entrollm.format.writer import ShardWriter
from entrollm.matrix import CodedMatrix, open_matrix
from entrollm.threads import start_pool

_CHUNK_WEIGHTS = 1 << 22


class Refit:
    """Writes the shards of a compressed folder again with other scales; all else stays as it is.

    Args:
        folder: a complete compressed folder.
        checkpoint: what it was made from; the specs state the error against it.
        scales: by entry, in their stored types and sizes.
        threads: to decode on; None for one per core.
    """

    def __init__(
        self, folder: Path, checkpoint: Checkpoint, scales: Mapping[str, NDArray[Any]], threads: int | None
    ) -> None:
        self._model = CompressedModel.open(folder)
        self._checkpoint = checkpoint
        self._scales = scales
        self._pool = start_pool(threads)

    def growth(self) -> int:
        """How many bytes the entries grow by, since other scales deflate to other sizes."""
        model = self._model
        return sum(_bytes(self._joined(name)[1]) - _bytes(model.entries(name)) for name in model.specs)

    def shard(self, path: Path, names: Iterable[str]) -> int:
        """Write one shard of the folder again.

        Args:
            path: the shard.
            names: its tensors.
        Returns:
            its new size in bytes.
        """
        model = self._model
        with ShardWriter(path) as writer:
            for name in sorted(names, key=lambda name: name not in model.specs):
                if name not in model.specs:
                    array = model.array(name)
                    writer.add_plain(name, model.dtype(name), array.shape, [array])
                    continue
                spec, entries = self._joined(name)
                error = self._error(open_matrix(name, spec, entries))
                writer.add_matrix(StoredMatrix.seal(name, dataclasses.replace(spec, relative_error=error), entries))
        return path.stat().st_size

    def _joined(self, name: str) -> tuple[TensorSpec, dict[str, NDArray[Any]]]:
        """A matrix with its new scales, as `join_arrays` returns it."""
        arrays = self._model.matrix_arrays(name)
        arrays |= {s: self._scales[name + s] for s in arrays if name + s in self._scales}
        return join_arrays(dataclasses.replace(self._model.specs[name], parts=None), arrays)

    def _error(self, matrix: CodedMatrix) -> float:
        error = energy = 0.0
        step = max(1, _CHUNK_WEIGHTS // matrix.spec.columns)
        for begin in range(0, matrix.spec.rows, step):
            rows = np.arange(begin, min(matrix.spec.rows, begin + step))
            weights = self._checkpoint.read_float32(matrix.name, begin, begin + len(rows))
            error += float(np.sum(np.square(matrix.dequantize(rows, self._pool) - weights, dtype=np.float64)))
            energy += float(np.sum(np.square(weights, dtype=np.float64)))
        self._checkpoint.release(matrix.name)
        return relative_error(error, energy)


def _bytes(arrays: Mapping[str, NDArray[Any]]) -> int:
    return sum(array.nbytes for array in arrays.values())
