"""The weights that the engine multiplies with: coded matrices of a compressed folder, or dense float32 ones."""

from __future__ import annotations

from entrollm import _core
from entrollm.checkpoint import Checkpoint, to_float32
from entrollm.container.reader import CodedMatrix, CompressedModel
from entrollm.engine.weights import Embedding, Floats, Ids, Linear


class CodedLinear:
    """A coded matrix; it is decoded block by block inside every product and never held decoded."""

    def __init__(self, matrix: CodedMatrix, pool: _core.ThreadPool) -> None:
        self._matrix = matrix
        self._pool = pool
        self.shape = (matrix.spec.rows, matrix.spec.columns)

    def __call__(self, x: Floats, /) -> Floats:
        """Multiply: float32 (n, in_features) -> float32 (n, out_features)."""
        return self._matrix.multiply(x, self._pool)

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


class CodedWeights:
    """The tensors of a compressed folder. Matrices that were kept in their type are dense."""

    def __init__(self, model: CompressedModel, threads: int) -> None:
        self._model = model
        self._pool = _core.ThreadPool(threads)
        self._matrices: dict[str, CodedLinear | DenseLinear] = {}

    def __contains__(self, name: str, /) -> bool:
        return name in self._model.specs or name in self._model.plain

    def linear(self, name: str, /) -> Linear:
        """The matrix `name`, to multiply with."""
        return self._matrix(name)

    def embedding(self, name: str, /) -> Embedding:
        """The matrix `name`, to look rows up in."""
        return self._matrix(name)

    def tensor(self, name: str, /) -> Floats:
        """The tensor `name` in float32."""
        return to_float32(self._model.array(name))

    def _matrix(self, name: str) -> CodedLinear | DenseLinear:
        if name not in self._matrices:
            coded = name in self._model.specs
            self._matrices[name] = (
                CodedLinear(self._model.matrix(name), self._pool) if coded else DenseLinear(self.tensor(name))
            )
        return self._matrices[name]


class DenseWeights:
    """The tensors of an ordinary checkpoint, in float32; the reference that compressed models are compared with."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint
        self._matrices: dict[str, DenseLinear] = {}

    def __contains__(self, name: str, /) -> bool:
        return name in self._checkpoint.tensors

    def linear(self, name: str, /) -> Linear:
        """The matrix `name`, to multiply with."""
        return self._matrix(name)

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
