"""The weights of an ordinary checkpoint, read anew for each product, for a model that runs once in little memory."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from entrollm.engine.linear import DenseWeights
from entrollm.engine.weights import DenseMatrix, Floats, Ids

if TYPE_CHECKING:
    from entrollm.checkpoint.model_folder import Checkpoint

# Weights that are held in float32 at a time.
_CHUNK_WEIGHTS = 1 << 23


class StreamedMatrix:
    """A matrix of a checkpoint, read in chunks of rows whenever it is used."""

    def __init__(self, checkpoint: Checkpoint, name: str) -> None:
        self._checkpoint = checkpoint
        self._name = name
        # A tensor that is not a matrix fails the check of its shape.
        self.shape: tuple[int, int] = checkpoint.tensors[name].shape  # type: ignore[assignment]

    def __call__(self, x: Floats, /) -> Floats:
        """Multiply: float32 (n, in_features) -> float32 (n, out_features)."""
        rows, columns = self.shape
        product = np.empty((len(x), rows), np.float32)
        step = max(1, _CHUNK_WEIGHTS // max(1, columns))
        for begin in range(0, rows, step):
            end = min(rows, begin + step)
            product[:, begin:end] = x @ self._checkpoint.read_float32(self._name, begin, end).T
        self._checkpoint.release(self._name)
        return product

    def rows(self, ids: Ids, /) -> Floats:
        """Look up: int64 (n,) -> float32 (n, in_features)."""
        found = [self._checkpoint.read_float32(self._name, int(i), int(i) + 1) for i in ids]
        self._checkpoint.release(self._name)
        return np.concatenate(found)


class StreamedWeights(DenseWeights):
    """The tensors of an ordinary checkpoint, of which little is in memory at a time."""

    def _open(self, stored: str) -> DenseMatrix:
        return StreamedMatrix(self._checkpoint, stored)
