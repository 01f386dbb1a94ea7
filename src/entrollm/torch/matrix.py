"""What every back end offers: a coded matrix that multiplies with tensors."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor


class Matrix(Protocol):
    """A coded matrix that is ready to multiply with tensors on its device."""

    @property
    def shape(self) -> tuple[int, int]:
        """(out_features, in_features)."""

    def multiply(self, x: Tensor, /) -> Tensor:
        """Multiply: (n, in_features) -> (n, out_features) in the type of x."""

    def rows(self, ids: Tensor, /) -> Tensor:
        """Look up rows: integers (n,) -> float32 (n, in_features)."""

    def dequantize(self, dtype: torch.dtype, /) -> Tensor:
        """Decode all weights: (out_features, in_features)."""


class ScaledMatrix:
    """A coded matrix times a number."""

    def __init__(self, matrix: Matrix, factor: float) -> None:
        self.shape = matrix.shape
        self._matrix = matrix
        self._factor = factor

    def multiply(self, x: Tensor) -> Tensor:
        """Multiply: (n, in_features) -> (n, out_features) in the type of x."""
        return self._matrix.multiply(x) * self._factor

    def rows(self, ids: Tensor) -> Tensor:
        """Look up rows: integers (n,) -> float32 (n, in_features)."""
        return self._matrix.rows(ids) * self._factor

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """Decode all weights: (out_features, in_features)."""
        return self._matrix.dequantize(dtype) * self._factor
