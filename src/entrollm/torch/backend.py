"""The choice of a back end by device: native kernels, CUDA kernels, or plain torch operations."""

from __future__ import annotations

import functools
import importlib.util
import warnings
from collections.abc import Mapping, Sequence
from contextvars import ContextVar
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

from entrollm.errors import UnsupportedError
from entrollm.format.flat import FlatCode
from entrollm.format.group_scales import GroupedKind
from entrollm.format.lossless import LosslessKind
from entrollm.format.spec import TensorSpec
from entrollm.torch.cuda import (
    MIN_CAPABILITY,
    CodedExperts,
    CudaMatrix,
    ExpertMatrices,
    FlatCudaMatrix,
    FlatExperts,
    GroupedCudaMatrix,
    GroupedExperts,
    LosslessCudaMatrix,
    open_cuda,
    open_lossless_cuda,
)
from entrollm.torch.matrix import Matrix
from entrollm.torch.native import DecodedMatrix, HostMatrix, NativeMatrix, open_for_products, open_native
from entrollm.torch.plain import PlainMatrix

PartT = TypeVar("PartT")

Backend = Literal["auto", "fast", "plain"]
"""`auto`: native kernels on the CPU, CUDA kernels on NVIDIA GPUs, plain torch operations on other devices; `fast`: the
same, with matrices in fields of fixed width on NVIDIA GPUs, which takes more memory there and less time; `plain`: plain
torch operations everywhere."""

default_backend: ContextVar[Backend] = ContextVar("default_backend", default="auto")
"""The back end of coded weights that are made from now on."""

checks_bytes: ContextVar[bool | None] = ContextVar("checks_bytes", default=None)
"""Whether folders that are loaded from now on are compared with their checksums; `None` where nobody has decided."""


class Concatenation:
    """Opened matrices, one below the other, that multiply one by one."""

    def __init__(self, matrices: Sequence[Matrix]) -> None:
        self.shape = (sum(matrix.shape[0] for matrix in matrices), matrices[0].shape[1])
        self._matrices = matrices

    def multiply(self, x: Tensor) -> Tensor:
        """Multiply: (n, in_features) -> (n, out_features) in the type of x."""
        return torch.cat([matrix.multiply(x) for matrix in self._matrices], dim=1)

    def rows(self, ids: Tensor) -> Tensor:
        """Look up rows: integers (n,) -> float32 (n, in_features)."""
        return self.dequantize(torch.float32)[ids]

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """Decode all weights: (out_features, in_features)."""
        return torch.cat([matrix.dequantize(dtype) for matrix in self._matrices])


def join(matrices: Sequence[Matrix]) -> Matrix | None:
    """Join opened matrices, one below the other, to one that multiplies in one launch; `None` if they cannot be."""
    native = [matrix for matrix in matrices if isinstance(matrix, NativeMatrix)]
    if len(native) == len(matrices):
        return NativeMatrix([part for matrix in native for part in matrix.matrices])
    cuda = [matrix for matrix in matrices if isinstance(matrix, CudaMatrix)]
    if len(cuda) == len(matrices) and len({matrix.device for matrix in cuda}) == 1:
        return CudaMatrix([part for matrix in cuda for part in matrix.parts], cuda[0].device)
    flat = [matrix for matrix in matrices if isinstance(matrix, FlatCudaMatrix)]
    if len(flat) == len(matrices) and len({matrix.device for matrix in flat}) == 1:
        return FlatCudaMatrix([part for matrix in flat for part in matrix.parts], flat[0].device)
    lossless = [matrix for matrix in matrices if isinstance(matrix, LosslessCudaMatrix)]
    if len(lossless) == len(matrices) and len({matrix.device for matrix in lossless}) == 1:
        return LosslessCudaMatrix([part for matrix in lossless for part in matrix.parts], lossless[0].device)
    return None


def join_experts(experts: Sequence[Sequence[Matrix]]) -> ExpertMatrices[Any] | None:
    """Join the opened matrices of experts, so that one launch multiplies by chosen ones.

    Args:
        experts: the matrices of each expert, on one device.
    Returns:
        all of them; `None` if they are of several forms or shapes, or not on a GPU.
    """
    matrices = [matrix for parts in experts for matrix in parts]
    shapes = [[matrix.shape for matrix in parts] for parts in experts]
    if any(shape != shapes[0] for shape in shapes):
        return None
    flat = [matrix.parts[0] for matrix in matrices if isinstance(matrix, FlatCudaMatrix)]
    coded = [matrix.parts[0] for matrix in matrices if isinstance(matrix, CudaMatrix)]
    grouped = [matrix.part for matrix in matrices if isinstance(matrix, GroupedCudaMatrix)]
    if len(flat) == len(matrices):
        return FlatExperts(_by_expert(flat, len(shapes[0])), flat[0].data.device)
    if len(coded) == len(matrices):
        return CodedExperts(_by_expert(coded, len(shapes[0])), coded[0].table.device)
    are_alike = len({part.macros() for part in grouped}) == 1
    can_multiply = all(part.is_multipliable and part.order is None for part in grouped)
    if len(grouped) == len(matrices) and are_alike and can_multiply:
        return GroupedExperts(_by_expert(grouped, len(shapes[0])), next(iter(grouped[0].fields.values())).device)
    return None


def _by_expert(parts: list[PartT], count: int) -> list[list[PartT]]:
    """The parts of all experts, `count` of each."""
    return [parts[begin : begin + count] for begin in range(0, len(parts), count)]


def open_on(
    name: str, spec: TensorSpec, entries: Mapping[str, Tensor], device: torch.device, backend: Backend
) -> Matrix:
    """Open a coded matrix on a device.

    Args:
        name: the tensor's name, for errors.
        spec: the matrix's spec.
        entries: its stored entries by suffix, on the device or on the CPU.
        device: where it will multiply.
        backend: the back end to choose from.
    Raises:
        CorruptStreamError: a block of a matrix with a trellis does not decode.
        FormatError: the entries do not match the spec.
        UnsupportedError: packages that the CUDA kernels need are missing.
    """
    uses_kernels = backend != "plain" and uses_cuda_kernels(device)
    if backend != "plain" and device.type == "cpu":
        return open_for_products(name, spec, entries)
    if isinstance(spec.code, FlatCode) and not uses_kernels:
        return HostMatrix(open_native(name, spec, entries), device)
    if backend != "plain" and isinstance(spec.kind, LosslessKind):
        decoded = DecodedMatrix(open_native(name, spec, entries), device)
        if not uses_kernels or spec.kind.type != "BF16":
            return decoded
        check_cuda_packages()
        return open_lossless_cuda(name, decoded.weight, device) or decoded
    if uses_kernels:
        check_cuda_packages()
        return open_cuda(open_native(name, spec, entries), device, backend == "fast")
    if isinstance(spec.kind, GroupedKind):
        return HostMatrix(open_native(name, spec, entries), device)
    return PlainMatrix(name, spec, {suffix: entry.to(device) for suffix, entry in entries.items()}, device)


def uses_cuda_kernels(device: torch.device) -> bool:
    """Whether the CUDA kernels support a device: an NVIDIA GPU that is new enough."""
    if device.type != "cuda" or torch.version.hip is not None:
        return False
    return _is_capable(torch.cuda.current_device() if device.index is None else device.index)


def storage_device(device: torch.device) -> torch.device:
    """Where the stored entries of a matrix on `device` are kept.

    The CUDA kernels have a layout of their own, so the entries stay on the CPU.
    """
    return torch.device("cpu") if uses_cuda_kernels(device) else device


@functools.cache
def _is_capable(index: int) -> bool:
    capability = torch.cuda.get_device_capability(index)
    if capability >= MIN_CAPABILITY:
        return True
    warnings.warn(
        f"cuda:{index} has compute capability {capability[0]}.{capability[1]}, and the kernels of EntroLLM need "
        f"{MIN_CAPABILITY[0]}.{MIN_CAPABILITY[1]}; its layers are decoded with plain torch operations, slowly",
        stacklevel=2,
    )
    return False


def check_cuda_packages() -> None:
    """Check that the packages that the CUDA kernels need are installed, without importing them.

    Raises:
        UnsupportedError: a package is missing.
    """
    try:
        found = importlib.util.find_spec("cuda.core") is not None
    except ModuleNotFoundError:
        found = False
    if not found:
        raise UnsupportedError(
            "models on NVIDIA GPUs need the package cuda-core, which is missing; run: pip install 'entrollm[cuda]' "
            '(or load the model with entrollm.hf.load(..., backend="plain"), for slow plain torch operations)'
        )
