"""The CUDA back end: products that decode as they multiply, on NVIDIA GPUs."""

from entrollm.torch.cuda.coded_experts import CodedExperts
from entrollm.torch.cuda.experts import ExpertMatrices
from entrollm.torch.cuda.flat_experts import FlatExperts
from entrollm.torch.cuda.flat_matrix import FlatCudaMatrix
from entrollm.torch.cuda.grouped import GroupedCudaMatrix
from entrollm.torch.cuda.grouped_experts import GroupedExperts
from entrollm.torch.cuda.lossless_matrix import LosslessCudaMatrix
from entrollm.torch.cuda.matrix import CudaMatrix
from entrollm.torch.cuda.open import open_cuda, open_lossless_cuda
from entrollm.torch.cuda.tuning import MIN_CAPABILITY

__all__ = [
    "MIN_CAPABILITY",
    "CodedExperts",
    "CudaMatrix",
    "ExpertMatrices",
    "FlatCudaMatrix",
    "FlatExperts",
    "GroupedCudaMatrix",
    "GroupedExperts",
    "LosslessCudaMatrix",
    "open_cuda",
    "open_lossless_cuda",
]
