"""The three ways to multiply with a coded matrix in torch, chosen by the device of its entries."""

from __future__ import annotations

import atexit
import functools
import importlib.util
import warnings
from collections.abc import Mapping, Sequence
from contextvars import ContextVar
from typing import Any, Literal, Protocol

import ml_dtypes
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from entrollm import _core
from entrollm.errors import UnsupportedError
from entrollm.format.group_scales import GroupedKind
from entrollm.format.spec import TensorSpec
from entrollm.matrix import CodedMatrix, multiply, open_matrix
from entrollm.torch.cuda import MIN_CAPABILITY, CudaMatrix
from entrollm.torch.plain import PlainMatrix

Backend = Literal["auto", "plain"]
"""`auto`: native kernels on the CPU, CUDA kernels on NVIDIA GPUs, plain torch operations elsewhere; `plain`: these
everywhere."""

default_backend: ContextVar[Backend] = ContextVar("default_backend", default="auto")
"""What coded matrices are loaded with."""

# Weights that are decoded on the host at a time for another device.
_HOST_WEIGHTS = 1 << 22


class Matrix(Protocol):
    """A coded matrix that is ready to multiply with tensors on its device."""

    @property
    def shape(self) -> tuple[int, int]:
        """(out_features, in_features)."""

    def multiply(self, x: Tensor, /) -> Tensor:
        """Multiply: (n, in_features) -> (n, out_features) in the type of x."""

    def rows(self, ids: Tensor, /) -> Tensor:
        """Look up: integers (n,) -> float32 (n, in_features)."""

    def dequantize(self, dtype: torch.dtype, /) -> Tensor:
        """All weights: (out_features, in_features)."""


class NativeMatrix:
    """Coded matrices on the CPU, one below the other, read in place by the native kernels."""

    def __init__(self, matrices: Sequence[CodedMatrix]) -> None:
        self.shape = (sum(matrix.spec.rows for matrix in matrices), matrices[0].spec.columns)
        self.matrices = tuple(matrices)

    def multiply(self, x: Tensor) -> Tensor:
        """Multiply: (n, in_features) -> (n, out_features) in the type of x."""
        activations = x.detach().to(torch.float32).contiguous().numpy()
        return torch.from_numpy(multiply(self.matrices, activations, _pool())).to(x.dtype)

    def rows(self, ids: Tensor) -> Tensor:
        """Look up in the only matrix: integers (n,) -> float32 (n, in_features).

        Raises:
            IndexError: an id is outside of the matrix.
        """
        (matrix,) = self.matrices
        wanted = ids.to(torch.int64).contiguous().numpy()
        if wanted.size and not 0 <= wanted.min() <= wanted.max() < self.shape[0]:
            raise IndexError(f"{matrix.name}: a row is looked up that is outside of its {self.shape[0]} rows")
        return torch.from_numpy(matrix.dequantize(wanted, _pool()))

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """All weights: (out_features, in_features)."""
        weights = torch.empty(self.shape, dtype=dtype)
        begin = 0
        for matrix in self.matrices:
            rows = matrix.spec.rows
            weights[begin : begin + rows] = torch.from_numpy(matrix.dequantize(np.arange(rows), _pool()))
            begin += rows
        return weights


class HostMatrix:
    """A coded matrix whose scales only the host knows how to apply: it is decoded there, some rows at a time.

    Args:
        matrix: the matrix, on the CPU.
        device: where it multiplies.
    """

    def __init__(self, matrix: CodedMatrix, device: torch.device) -> None:
        self.shape = (matrix.spec.rows, matrix.spec.columns)
        self._matrix = NativeMatrix([matrix])
        self._device = device

    def multiply(self, x: Tensor) -> Tensor:
        """Multiply: (n, in_features) -> (n, out_features) in the type of x."""
        step = max(1, _HOST_WEIGHTS // self.shape[1])
        chunks = torch.split(torch.arange(self.shape[0]), step)
        return torch.cat([functional.linear(x, self._decode(chunk, x.dtype)) for chunk in chunks], dim=1)

    def rows(self, ids: Tensor) -> Tensor:
        """Look up: integers (n,) -> float32 (n, in_features).

        Raises:
            IndexError: an id is outside of the matrix.
        """
        return self._decode(ids.cpu(), torch.float32)

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """All weights: (out_features, in_features)."""
        return self._decode(torch.arange(self.shape[0]), dtype)

    def _decode(self, ids: Tensor, dtype: torch.dtype) -> Tensor:
        return self._matrix.rows(ids).to(device=self._device, dtype=dtype)


class Stacked:
    """Opened matrices one below the other that multiply one by one."""

    def __init__(self, matrices: Sequence[Matrix]) -> None:
        self.shape = (sum(matrix.shape[0] for matrix in matrices), matrices[0].shape[1])
        self._matrices = matrices

    def multiply(self, x: Tensor) -> Tensor:
        """Multiply: (n, in_features) -> (n, out_features) in the type of x."""
        return torch.cat([matrix.multiply(x) for matrix in self._matrices], dim=1)

    def rows(self, ids: Tensor) -> Tensor:
        """Look up: integers (n,) -> float32 (n, in_features)."""
        return self.dequantize(torch.float32)[ids]

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """All weights: (out_features, in_features)."""
        return torch.cat([matrix.dequantize(dtype) for matrix in self._matrices])


def join(matrices: Sequence[Matrix]) -> Matrix | None:
    """Opened matrices one below the other that multiply in one launch; None where they cannot."""
    native = [matrix for matrix in matrices if isinstance(matrix, NativeMatrix)]
    if len(native) == len(matrices):
        return NativeMatrix([part for matrix in native for part in matrix.matrices])
    cuda = [matrix for matrix in matrices if isinstance(matrix, CudaMatrix)]
    if len(cuda) == len(matrices) and len({matrix.device for matrix in cuda}) == 1:
        return CudaMatrix.from_parts([part for matrix in cuda for part in matrix.parts], cuda[0].device)
    return None


def open_on(
    name: str, spec: TensorSpec, entries: Mapping[str, Tensor], device: torch.device, backend: Backend
) -> Matrix:
    """Open a coded matrix on a device.

    Args:
        name: the tensor's name, for errors.
        spec: what it is.
        entries: its stored entries by suffix, on the device or on the CPU.
        device: where it will multiply.
        backend: how.
    Raises:
        FormatError: the entries do not match the spec.
        UnsupportedError: the CUDA kernels' packages are missing.
    """
    if backend == "auto" and device.type == "cpu":
        return NativeMatrix([open_native(name, spec, entries)])
    if isinstance(spec.kind, GroupedKind):
        return HostMatrix(open_native(name, spec, entries), device)
    if backend == "auto" and uses_cuda_kernels(device):
        return _open_cuda(open_native(name, spec, entries), device)
    return PlainMatrix(name, spec, {suffix: entry.to(device) for suffix, entry in entries.items()}, device)


def open_native(name: str, spec: TensorSpec, entries: Mapping[str, Tensor]) -> CodedMatrix:
    """Open a coded matrix on the CPU; entries there are read in place.

    Raises:
        FormatError: the entries do not match the spec.
    """
    return open_matrix(name, spec, {suffix: to_array(entry.cpu()) for suffix, entry in entries.items()})


def to_array(entry: Tensor) -> NDArray[Any]:
    """A view of a stored entry on the CPU."""
    if entry.dtype == torch.bfloat16:
        return entry.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return entry.numpy()


def to_tensor(array: NDArray[Any]) -> Tensor:
    """A stored entry as a tensor on the CPU, a copy."""
    if array.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(array.view(np.int16).copy()).view(torch.bfloat16)
    return torch.from_numpy(array.copy())


def uses_cuda_kernels(device: torch.device) -> bool:
    """Whether the CUDA kernels serve a device: an NVIDIA GPU that is new enough."""
    if device.type != "cuda" or torch.version.hip is not None:
        return False
    return _is_capable(torch.cuda.current_device() if device.index is None else device.index)


def resting_place(device: torch.device) -> torch.device:
    """Where stored entries lie for a device: the CUDA kernels have a layout of their own and leave them on the host."""
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


def _open_cuda(matrix: CodedMatrix, device: torch.device) -> Matrix:
    check_cuda_packages()
    return CudaMatrix([matrix], device)


def check_cuda_packages() -> None:
    """Check that what the CUDA kernels need is installed.

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


def _pool() -> _core.ThreadPool:
    """The threads of the native kernels, as many as torch uses."""
    return _pool_of(torch.get_num_threads())


@functools.cache
def _pool_of(threads: int) -> _core.ThreadPool:
    return _core.ThreadPool(threads)


# Threads end before the interpreter does.
atexit.register(_pool_of.cache_clear)
