"""Fused decode and product on NVIDIA GPUs."""

from entrollm.torch.cuda.compile import MIN_CAPABILITY
from entrollm.torch.cuda.matrix import CudaMatrix

__all__ = ["MIN_CAPABILITY", "CudaMatrix"]
