"""Weights held as plain float32 arrays: what the engine is tested with when no compression is involved."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors import safe_open

from entrollm import _core
from entrollm.engine.files import read_model_files
from entrollm.engine.model import Model
from entrollm.engine.weights import Fetch, Floats, Ids, stacked_matrix


class DenseMatrix:
    """A float32 matrix that is both a Linear and an Embedding."""

    def __init__(self, matrix: Floats) -> None:
        self.matrix = matrix
        self.shape: tuple[int, int] = (matrix.shape[0], matrix.shape[1])

    def __call__(self, x: Floats) -> Floats:
        return x @ self.matrix.T

    def rows(self, ids: Ids) -> Floats:
        return self.matrix[ids]


class DenseWeights:
    """Named float32 arrays."""

    def __init__(self, tensors: dict[str, Floats]) -> None:
        self.tensors = tensors
        self.pool = _core.ThreadPool(1)

    def __contains__(self, name: str) -> bool:
        return name in self.tensors or self._stacked(name) is not None

    def linear(self, *names: str) -> DenseMatrix:
        return DenseMatrix(np.concatenate([self.tensor(name) for name in names]))

    def embedding(self, name: str) -> DenseMatrix:
        return DenseMatrix(self.tensor(name))

    def fetcher(self, experts: Sequence[Sequence[str]], /) -> Fetch | None:
        return None

    def tensor(self, name: str) -> Floats:
        stacked = None if name in self.tensors else self._stacked(name)
        return self.tensors[name] if stacked is None else self.tensors[stacked[0]][stacked[1]]

    def _stacked(self, name: str) -> tuple[str, int] | None:
        return stacked_matrix(name, lambda stack: self.tensors[stack].shape if stack in self.tensors else None)


def read_tensors(folder: Path) -> dict[str, Floats]:
    """All tensors of a checkpoint, single or sharded, upcast to float32."""
    index = folder / "model.safetensors.index.json"
    names = {"model.safetensors"}
    if index.exists():
        names = set(json.loads(index.read_text())["weight_map"].values())
    tensors = {}
    for name in names:
        with safe_open(folder / name, framework="numpy") as shard:
            for key in shard.keys():  # noqa: SIM118 (not a mapping)
                tensors[key] = np.asarray(shard.get_tensor(key)).astype(np.float32)
    return tensors


def load_dense(folder: Path) -> Model:
    """The checkpoint in `folder` as a model with float32 weights."""
    return Model(read_model_files(folder), DenseWeights(read_tensors(folder)))


# Registers bfloat16 with numpy, which safetensors needs to read it.
assert ml_dtypes.bfloat16
