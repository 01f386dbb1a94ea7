"""Coded matrices in GPU memory: multiply by them, look up rows, decode them."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from entrollm.torch.cuda.decode import decode
from entrollm.torch.cuda.device_matrix import DeviceMatrix
from entrollm.torch.cuda.gpu import gpu_of
from entrollm.torch.cuda.parted import PartedMatrix
from entrollm.torch.cuda.plan import Plan
from entrollm.torch.cuda.product import Product, product_plan


class CudaMatrix(PartedMatrix[DeviceMatrix, Product]):
    """Coded matrices, one below the other, on one GPU, which never holds them decoded."""

    def multiply(self, x: Tensor) -> Tensor:
        """Multiply: (n, in_features) -> (n, out_features) in the type of x, which is float32, bfloat16 or float16.

        A few vectors are multiplied while the matrix is decoded. For more, or if rows are so long that activations do
        not fit in shared memory, the matrix is first decoded to memory in the type of x.
        """
        if x.shape[0] > self._max_batch or self._largest_batch == 0:
            return x @ self.dequantize(x.dtype).T
        return self._launch(x, self._largest_batch)

    def plan(self, batch: int) -> Plan:
        """How the product with `batch` vectors uses shared memory."""
        return product_plan(self.parts, batch, self.device)

    @functools.cached_property
    def _max_batch(self) -> int:
        return gpu_of(self.device).tuning.max_batch

    @functools.cached_property
    def _largest_batch(self) -> int:
        """Vectors that one launch takes; 0 if not even one fits in shared memory."""
        return next((batch for batch in range(self._max_batch, 0, -1) if self.plan(batch).fits), 0)

    def _make_product(self, batch: int, dtype: torch.dtype) -> Product:
        return Product(self.parts, batch, dtype, self.device)

    def _decode(self, part: DeviceMatrix, out: Tensor, ids: Tensor | None) -> None:
        decode(part, out, ids, self.device)
