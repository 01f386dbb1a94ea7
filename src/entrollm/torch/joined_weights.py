"""Coded weights that multiply the same input in one launch: the parts of an expert, and joined layers."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from entrollm.torch import operators
from entrollm.torch.backend import Concatenation, join
from entrollm.torch.matrix import Matrix
from entrollm.torch.weight import CodedWeight

_MatrixRefs = list["weakref.ref[Matrix]"]


class JoinedWeights:
    """Coded weights with the same number of columns, one below the other."""

    def __init__(self, weights: Sequence[CodedWeight]) -> None:
        self.weights = tuple(weights)
        self.rows = [weight.spec.rows for weight in weights]
        self.out_features = sum(self.rows)
        self.number = operators.register(self)
        # The joined matrix and the opened matrices that it was made from. The first of these is the key, so that the
        # joined matrix is dropped when that one is, as in a move to another device.
        self._joined: weakref.WeakKeyDictionary[Matrix, tuple[_MatrixRefs, Matrix]] = weakref.WeakKeyDictionary()

    @property
    def device(self) -> torch.device:
        """The device that they multiply on."""
        return self.weights[0].device

    def are_together(self) -> bool:
        """Whether all are on one device and none is offloaded, since offloaded entries arrive one matrix at a time."""
        return all(weight.device == self.device and not weight.is_offloaded for weight in self.weights)

    def matrix(self) -> Matrix:
        """The opened matrices as one."""
        opened = [weight.matrix() for weight in self.weights]
        found = self._joined.get(opened[0])
        if found is not None and all(old() is new for old, new in zip(found[0], opened, strict=True)):
            return found[1]
        joined = join(opened)
        if joined is None:
            return Concatenation(opened)
        self._joined[opened[0]] = [weakref.ref(matrix) for matrix in opened], joined
        return joined

    def multiply(self, x: Tensor) -> Tensor:
        """Multiply: (..., in_features) -> (..., sum of out_features) in the type of x."""
        return operators.product(x, self)

    def split(self, product: Tensor) -> list[Tensor]:
        """Split such a product into those of each weight."""
        return split_product(product, self.rows)

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return JoinedWeights, (self.weights,)


def split_product(product: Tensor, rows: Sequence[int]) -> list[Tensor]:
    """Split a product of joined weights with these numbers of rows into contiguous products of each."""
    return [part.contiguous() for part in torch.split(product, list(rows), dim=-1)]
