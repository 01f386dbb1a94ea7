"""Fused decode and product on NVIDIA GPUs."""

from entrollm.hf.cuda.compile import MIN_CAPABILITY
from entrollm.hf.cuda.matrix import CudaMatrix

__all__ = ["MIN_CAPABILITY", "CudaMatrix"]
