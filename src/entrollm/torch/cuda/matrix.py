"""Coded matrices in GPU memory: multiply by them, look up rows, decode them."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from entrollm.torch.cuda.decode import decode
from entrollm.torch.cuda.device_matrix import DeviceMatrix
from entrollm.torch.cuda.gpu import gpu_of
from entrollm.torch.cuda.launch import MAX_MATRICES, aligned
from entrollm.torch.cuda.plan import Plan
from entrollm.torch.cuda.product import Product, product_plan


class CudaMatrix:
    """Matrices, one below the other, on one GPU, which never holds them decoded.

    Args:
        parts: matrices with the same number of columns.
        device: the GPU.
    """

    def __init__(self, parts: Sequence[DeviceMatrix], device: torch.device) -> None:
        if not 1 <= len(parts) <= MAX_MATRICES:
            raise ValueError(f"a product takes 1 to {MAX_MATRICES} matrices, not {len(parts)}")
        if len({part.shape.columns for part in parts}) != 1:
            raise ValueError(f"matrices of one product must have the same columns: {[p.shape.columns for p in parts]}")
        self.parts = tuple(parts)
        self.device = device
        self.shape = (sum(part.shape.rows for part in parts), parts[0].shape.columns)
        self._products: dict[tuple[int, torch.dtype], Product] = {}

    @property
    def size_bytes(self) -> int:
        """GPU memory in use."""
        return sum(part.size_bytes for part in self.parts)

    def multiply(self, x: Tensor) -> Tensor:
        """Multiply: (n, in_features) -> (n, out_features) in the type of x, which is float32, bfloat16 or float16.

        A few vectors are multiplied while the matrix is decoded. For more, or if rows are so long that activations do
        not fit in shared memory, the matrix is first decoded to memory in the type of x.
        """
        step = self._largest_batch
        if x.shape[0] > self._max_batch or step == 0:
            return x @ self.dequantize(x.dtype).T
        y = x.new_empty(x.shape[0], self.shape[0])
        for begin in range(0, x.shape[0], step):
            part = aligned(x[begin : begin + step])
            self.product(len(part), x.dtype)(part, y[begin : begin + step])
        return y

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """Decode all weights: (out_features, in_features)."""
        out = torch.empty(self.shape, dtype=dtype, device=self.device)
        self.dequantize_into(out)
        return out

    def dequantize_into(self, out: Tensor) -> None:
        """Decode all weights to contiguous memory, (out_features, in_features)."""
        begin = 0
        for part in self.parts:
            decode(part, out[begin : begin + part.shape.rows], None, self.device)
            begin += part.shape.rows

    def plan(self, batch: int) -> Plan:
        """How the product with `batch` vectors uses shared memory."""
        return product_plan(self.parts, batch, self.device)

    def rows(self, ids: Tensor) -> Tensor:
        """Look up rows of the only matrix: integers (n,) -> float32 (n, in_features).

        Rows outside of the matrix are NaN, because waiting for the GPU to check each look-up would cost more than the
        look-up.
        """
        inside = (ids >= 0) & (ids < self.shape[0])
        ids = ids.clamp(0, self.shape[0] - 1).to(torch.int64)
        out = torch.empty(len(ids), self.shape[1], dtype=torch.float32, device=self.device)
        if len(ids):
            decode(self.parts[0], out, ids.contiguous(), self.device)
        return out.masked_fill_(~inside[:, None], torch.nan)

    @functools.cached_property
    def _max_batch(self) -> int:
        return gpu_of(self.device).tuning.max_batch

    @functools.cached_property
    def _largest_batch(self) -> int:
        """Vectors that one launch takes; 0 if not even one fits in shared memory."""
        return next((batch for batch in range(self._max_batch, 0, -1) if self.plan(batch).fits), 0)

    def product(self, batch: int, dtype: torch.dtype) -> Product:
        """The product with `batch` vectors of a type, ready to launch."""
        key = batch, dtype
        if key not in self._products:
            self._products[key] = Product(self.parts, batch, dtype, self.device)
        return self._products[key]
