"""The weights that the engine multiplies with: coded matrices of a compressed folder, or dense float32 ones."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from entrollm import _core
from entrollm.checkpoint.names import canonical_names
from entrollm.engine.weights import Embedding, Floats, Ids, Linear
from entrollm.files.dtypes import to_float32
from entrollm.format.reader import CompressedModel
from entrollm.matrix import CodedMatrix, matrix_of, multiply
from entrollm.threads import default_threads, spin_us

if TYPE_CHECKING:
    from entrollm.checkpoint.model_folder import Checkpoint


class CodedLinear:
    """Coded matrices side by side; each is decoded block by block inside every product and never held decoded."""

    def __init__(self, matrices: Sequence[CodedMatrix], pool: _core.ThreadPool) -> None:
        self._matrices = matrices
        self._pool = pool
        self.shape = (sum(matrix.spec.rows for matrix in matrices), matrices[0].spec.columns)

    def __call__(self, x: Floats, /) -> Floats:
        """Multiply: float32 (n, in_features) -> float32 (n, out_features)."""
        return multiply(self._matrices, x, self._pool)


class CodedEmbedding:
    """A coded matrix that is read by row."""

    def __init__(self, matrix: CodedMatrix, pool: _core.ThreadPool) -> None:
        self._matrix = matrix
        self._pool = pool
        self.shape = (matrix.spec.rows, matrix.spec.columns)

    def rows(self, ids: Ids, /) -> Floats:
        """Look up: int64 (n,) -> float32 (n, in_features)."""
        return self._matrix.dequantize(ids, self._pool)


class DenseLinear:
    """A matrix in float32."""

    def __init__(self, weight: Floats) -> None:
        self._weight = weight
        self.shape = (weight.shape[0], weight.shape[1])

    def __call__(self, x: Floats, /) -> Floats:
        """Multiply: float32 (n, in_features) -> float32 (n, out_features)."""
        return x @ self._weight.T

    def rows(self, ids: Ids, /) -> Floats:
        """Look up: int64 (n,) -> float32 (n, in_features)."""
        return self._weight[ids]


class _SideBySide:
    """Linear layers of different kinds on the same input."""

    def __init__(self, linears: Sequence[Linear]) -> None:
        self._linears = linears
        self.shape = (sum(linear.shape[0] for linear in linears), linears[0].shape[1])

    def __call__(self, x: Floats, /) -> Floats:
        """Multiply: float32 (n, in_features) -> float32 (n, out_features)."""
        return np.concatenate([linear(x) for linear in self._linears], axis=1)


class CodedWeights:
    """The tensors of a compressed folder. Matrices that were kept in their type are dense.

    Raises:
        FormatError: two tensors have the same name in a causal model.
    """

    def __init__(self, model: CompressedModel, threads: int) -> None:
        self._model = model
        is_tied = model.config.get("tie_word_embeddings") is True
        self._names = canonical_names([*model.specs, *model.plain], is_tied=is_tied)
        self.pool = _core.ThreadPool(threads, spin_us())
        self._coded: dict[str, CodedMatrix] = {}
        self._dense: dict[str, DenseLinear] = {}

    def __contains__(self, name: str, /) -> bool:
        return name in self._names

    def linear(self, *names: str) -> Linear:
        """The matrices `names`, their outputs side by side, to multiply with."""
        if all(self._names[name] in self._model.specs for name in names):
            return CodedLinear([self._matrix(name) for name in names], self.pool)
        if len(names) > 1:
            return _SideBySide([self.linear(name) for name in names])
        return self._kept(names[0])

    def embedding(self, name: str, /) -> Embedding:
        """The matrix `name`, to look rows up in."""
        if self._names[name] in self._model.specs:
            return CodedEmbedding(self._matrix(name), self.pool)
        return self._kept(name)

    def tensor(self, name: str, /) -> Floats:
        """The tensor `name` in float32."""
        return to_float32(self._model.array(self._names[name]))

    def _matrix(self, name: str) -> CodedMatrix:
        if name not in self._coded:
            self._coded[name] = matrix_of(self._model, self._names[name])
        return self._coded[name]

    def _kept(self, name: str) -> DenseLinear:
        if name not in self._dense:
            self._dense[name] = DenseLinear(self.tensor(name))
        return self._dense[name]


class DenseWeights:
    """The tensors of an ordinary checkpoint, in float32; the reference that compressed models are compared with."""

    def __init__(self, checkpoint: Checkpoint, threads: int | None = None) -> None:
        self.pool = _core.ThreadPool(threads or default_threads(), spin_us())
        self._checkpoint = checkpoint
        self._matrices: dict[str, DenseLinear] = {}

    def __contains__(self, name: str, /) -> bool:
        return name in self._checkpoint.tensors

    def linear(self, *names: str) -> Linear:
        """The matrices `names`, their outputs side by side, to multiply with."""
        matrices = [self._matrix(name) for name in names]
        return matrices[0] if len(matrices) == 1 else _SideBySide(matrices)

    def embedding(self, name: str, /) -> Embedding:
        """The matrix `name`, to look rows up in."""
        return self._matrix(name)

    def tensor(self, name: str, /) -> Floats:
        """The tensor `name` in float32."""
        return self._checkpoint.read_float32(name)

    def _matrix(self, name: str) -> DenseLinear:
        if name not in self._matrices:
            self._matrices[name] = DenseLinear(self.tensor(name))
        return self._matrices[name]
