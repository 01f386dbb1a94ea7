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
        step = self.launch_vectors(x.shape[0])
        return self._launch(x, step) if step else x @ self.dequantize(x.dtype).T

    def launch_vectors(self, batch: int) -> int:
        """Vectors that each launch of a product with `batch` vectors takes; 0 if the matrix is decoded to memory."""
        tuning, largest = gpu_of(self.device).tuning, self._largest_batch
        is_large = self.shape[0] * self.shape[1] >= tuning.many_weights
        few = tuning.few_vectors
        if batch > (tuning.many_batch if is_large and largest >= few else tuning.max_batch):
            return 0
        if largest >= few and (batch > tuning.max_batch or any(part.code.raw_bits for part in self.parts)):
            launches = max(1, -(-batch // few))
            return max(1, -(-batch // launches))
        return largest

    def plan(self, batch: int) -> Plan:
        """How the product with `batch` vectors uses shared memory."""
        return product_plan(self.parts, batch, self.device)

    @functools.cached_property
    def _largest_batch(self) -> int:
        """Vectors that one launch takes; 0 if not even one fits in shared memory."""
        most = gpu_of(self.device).tuning.max_batch
        return next((batch for batch in range(most, 0, -1) if self.plan(batch).fits), 0)

    def _make_product(self, batch: int, dtype: torch.dtype) -> Product:
        return Product(self.parts, batch, dtype, self.device)

    def _decode(self, part: DeviceMatrix, out: Tensor, ids: Tensor | None) -> None:
        decode(part, out, ids, self.device)
