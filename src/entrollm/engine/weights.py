"""What the engine needs of a model's weights, however they are stored."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from entrollm import _core
from entrollm.errors import FormatError
from entrollm.files.dtypes import check_finite
from entrollm.format.layout import stack_member

Floats = NDArray[np.float32]
Ids = NDArray[np.int64]

Fetch = Callable[[Iterable[int]], None]


class Linear(Protocol):
    """A matrix of shape (out_features, in_features) that multiplies activations; it adds no bias."""

    @property
    def shape(self) -> tuple[int, int]:
        """(out_features, in_features)."""

    def __call__(self, x: Floats, /) -> Floats:
        """Multiply: float32 (n, in_features) -> a new float32 (n, out_features), which the caller may overwrite."""


class Embedding(Protocol):
    """A matrix of shape (vocab_size, hidden_size) that is read by row."""

    @property
    def shape(self) -> tuple[int, int]:
        """(vocab_size, hidden_size)."""

    def rows(self, ids: Ids, /) -> Floats:
        """Look up: int64 (n,), each in [0, vocab_size) -> a new float32 (n, hidden_size)."""


class DenseMatrix(Linear, Embedding, Protocol):
    """A matrix that is multiplied with and read by row."""


class Weights(Protocol):
    """The tensors of one model, by their full name in the checkpoint."""

    @property
    def pool(self) -> _core.ThreadPool:
        """The threads that multiply with them, and do the arithmetic in between."""

    def __contains__(self, name: str, /) -> bool:
        """Whether the tensor exists."""

    def linear(self, *names: str) -> Linear:
        """The matrices `names`, their outputs side by side, to multiply with; all have the same in_features."""

    def embedding(self, name: str, /) -> Embedding:
        """The matrix `name`, to look rows up in."""

    def fetcher(self, experts: Sequence[Sequence[str]], /) -> Fetch | None:
        """What is to be told which experts are about to be used; None if nothing reads them ahead.

        Args:
            experts: the names of each one's matrices.
        """

    def tensor(self, name: str, /) -> Floats:
        """The tensor `name` (a norm or a bias) in float32."""


def stacked_matrix(name: str, shape_of: Callable[[str], tuple[int, ...] | None]) -> tuple[str, int] | None:
    """The tensor of three axes that holds the matrix `name`, and the number of the matrix in it.

    Args:
        name: as `format.layout.member_name` makes it.
        shape_of: the shape of a stored tensor; None if there is none of this name.
    Returns:
        None if no stored tensor holds it.
    """
    member = stack_member(name)
    shape = None if member is None else shape_of(member[0])
    return member if member is not None and shape is not None and len(shape) == 3 and member[1] < shape[0] else None


def load_linear(weights: Weights, shapes: Mapping[str, tuple[int, int]]) -> Linear:
    """Return the matrices `shapes`, by name, as one whose outputs lie side by side.

    Raises:
        FormatError: a tensor is missing or has another shape.
    """
    for name, shape in shapes.items():
        _check_present(weights, name, shape)
        _check_shape(name, shape, weights.linear(name).shape)
    return weights.linear(*shapes)


def load_embedding(weights: Weights, name: str, shape: tuple[int, int]) -> Embedding:
    """Return the embedding `name`.

    Raises:
        FormatError: the tensor is missing or its shape is not `shape`.
    """
    _check_present(weights, name, shape)
    embedding = weights.embedding(name)
    _check_shape(name, shape, embedding.shape)
    return embedding


def load_tensor(weights: Weights, name: str, shape: tuple[int, ...]) -> Floats:
    """Return the tensor `name`.

    Raises:
        FormatError: the tensor is missing, its shape is not `shape`, or a value is not finite.
    """
    _check_present(weights, name, shape)
    tensor = weights.tensor(name)
    _check_shape(name, shape, tensor.shape)
    check_finite(name, tensor)
    return tensor


def _check_present(weights: Weights, name: str, shape: tuple[int, ...]) -> None:
    if name not in weights:
        raise FormatError(f"{name}: the tensor is missing; config.json asks for shape {shape}")


def _check_shape(name: str, expected: tuple[int, ...], found: tuple[int, ...]) -> None:
    if tuple(found) != expected:
        raise FormatError(f"{name}: config.json asks for shape {expected}, found {tuple(found)}")
