"""What coded and flat matrices on a GPU share: several of them, one below the other, multiply in one launch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Generic, Protocol, TypeVar

import torch
from torch import Tensor

from entrollm.torch.cuda.launch import MAX_MATRICES, aligned


class Part(Protocol):
    """One matrix in GPU memory."""

    @property
    def rows(self) -> int:
        """Its rows."""

    @property
    def columns(self) -> int:
        """Its columns."""

    @property
    def size_bytes(self) -> int:
        """GPU memory in use."""


class LaunchedProduct(Protocol):
    """A product with a fixed number of vectors of one type, ready to launch."""

    def __call__(self, x: Tensor, y: Tensor) -> None:
        """Multiply `x` into `y`. Both are contiguous and of the product's type; rows of `x` are padded."""


PartT = TypeVar("PartT", bound=Part)
ProductT = TypeVar("ProductT", bound=LaunchedProduct)


class PartedMatrix(Generic[PartT, ProductT]):
    """Matrices, one below the other, on one GPU.

    Args:
        parts: matrices with the same number of columns.
        device: the GPU.
    """

    def __init__(self, parts: Sequence[PartT], device: torch.device) -> None:
        if not 1 <= len(parts) <= MAX_MATRICES:
            raise ValueError(f"a product takes 1 to {MAX_MATRICES} matrices, not {len(parts)}")
        if len({part.columns for part in parts}) != 1:
            raise ValueError(f"matrices of one product must have the same columns: {[p.columns for p in parts]}")
        self.parts = tuple(parts)
        self.device = device
        self.shape = (sum(part.rows for part in parts), parts[0].columns)
        self._products: dict[tuple[int, torch.dtype], ProductT] = {}

    @property
    def size_bytes(self) -> int:
        """GPU memory in use."""
        return sum(part.size_bytes for part in self.parts)

    def product(self, batch: int, dtype: torch.dtype) -> ProductT:
        """The product with `batch` vectors of a type, ready to launch."""
        key = batch, dtype
        if key not in self._products:
            self._products[key] = self._make_product(batch, dtype)
        return self._products[key]

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """Decode all weights: (out_features, in_features)."""
        out = torch.empty(self.shape, dtype=dtype, device=self.device)
        self.dequantize_into(out)
        return out

    def dequantize_into(self, out: Tensor) -> None:
        """Decode all weights to contiguous memory, (out_features, in_features)."""
        begin = 0
        for part in self.parts:
            self._decode(part, out[begin : begin + part.rows], None)
            begin += part.rows

    def rows(self, ids: Tensor) -> Tensor:
        """Look up rows of the only matrix: integers (n,) -> float32 (n, in_features).

        Rows outside of the matrix are NaN, because waiting for the GPU to check each look-up would cost more than the
        look-up.
        """
        inside = (ids >= 0) & (ids < self.shape[0])
        ids = ids.clamp(0, self.shape[0] - 1).to(torch.int64).contiguous()
        out = torch.empty(len(ids), self.shape[1], dtype=torch.float32, device=self.device)
        if len(ids):
            self._decode(self.parts[0], out, ids)
        return out.masked_fill_(~inside[:, None], torch.nan)

    def _launch(self, x: Tensor, step: int) -> Tensor:
        """Multiply `step` vectors at a time."""
        y = x.new_empty(x.shape[0], self.shape[0])
        for begin in range(0, x.shape[0], step):
            part = aligned(x[begin : begin + step])
            self.product(len(part), x.dtype)(part, y[begin : begin + step])
        return y

    def _make_product(self, batch: int, dtype: torch.dtype) -> ProductT:
        raise NotImplementedError

    def _decode(self, part: PartT, out: Tensor, ids: Tensor | None) -> None:
        """Decode a matrix, or the rows `ids` of it, to contiguous memory."""
        raise NotImplementedError
