"""The native back end: coded matrices on the CPU, multiplied and decoded by the native kernels."""

from __future__ import annotations

import atexit
import functools
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from entrollm import _core
from entrollm.format.lossless import LosslessKind
from entrollm.format.spec import TensorSpec
from entrollm.matrix import CodedMatrix, Product, open_matrix
from entrollm.threads import start_pool
from entrollm.torch.entries import WORD_TYPES, to_array

# Weights that are decoded on the CPU at a time for another device.
_DECODED_WEIGHTS = 1 << 22


def open_native(name: str, spec: TensorSpec, entries: Mapping[str, Tensor]) -> CodedMatrix:
    """Open a coded matrix on the CPU. Entries that are there already are read in place.

    Raises:
        FormatError: the entries do not match the spec.
    """
    return open_matrix(name, spec, {suffix: to_array(entry.cpu()) for suffix, entry in entries.items()})


def open_for_products(name: str, spec: TensorSpec, entries: Mapping[str, Tensor]) -> NativeMatrix:
    """Open a coded matrix on the CPU to multiply with; with a trellis in the flat form, since its code is slow.

    Raises:
        CorruptStreamError: a block does not decode.
        FormatError: the entries do not match the spec.
    """
    matrix = open_native(name, spec, entries)
    return NativeMatrix([matrix.to_flat(_pool()) if spec.has_trellis else matrix])


class NativeMatrix:
    """Coded or flat matrices on the CPU, one below the other, that the native kernels multiply with."""

    def __init__(self, matrices: Sequence[CodedMatrix]) -> None:
        self.shape = (sum(matrix.spec.rows for matrix in matrices), matrices[0].spec.columns)
        self.matrices = tuple(matrices)
        self._product = Product(self.matrices)

    def multiply(self, x: Tensor) -> Tensor:
        """Multiply: (n, in_features) -> (n, out_features) in the type of x."""
        activations = x.detach().to(torch.float32).contiguous().numpy()
        return torch.from_numpy(self._product(activations, _pool())).to(x.dtype)

    def rows(self, ids: Tensor) -> Tensor:
        """Look up rows of the only matrix: integers (n,) -> float32 (n, in_features).

        Raises:
            IndexError: an id is outside of the matrix.
        """
        (matrix,) = self.matrices
        wanted = ids.to(torch.int64).contiguous().numpy()
        if wanted.size and not 0 <= wanted.min() <= wanted.max() < self.shape[0]:
            raise IndexError(f"{matrix.name}: a row is looked up that is outside of its {self.shape[0]} rows")
        return torch.from_numpy(matrix.dequantize(wanted, _pool()))

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """Decode all weights: (out_features, in_features)."""
        weights = torch.empty(self.shape, dtype=dtype)
        begin = 0
        for matrix in self.matrices:
            rows = matrix.spec.rows
            weights[begin : begin + rows] = torch.from_numpy(matrix.dequantize(np.arange(rows), _pool()))
            begin += rows
        return weights


class HostMatrix:
    """A coded matrix that multiplies on another device, but that only the CPU can decode.

    The CPU decodes it, a few rows at a time, and the device multiplies.

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
        step = max(1, _DECODED_WEIGHTS // self.shape[1])
        chunks = torch.split(torch.arange(self.shape[0]), step)
        return torch.cat([functional.linear(x, self._decode(chunk, x.dtype)) for chunk in chunks], dim=1)

    def rows(self, ids: Tensor) -> Tensor:
        """Look up rows: integers (n,) -> float32 (n, in_features).

        Raises:
            IndexError: an id is outside of the matrix.
        """
        return self._decode(ids.cpu(), torch.float32)

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """Decode all weights: (out_features, in_features)."""
        return self._decode(torch.arange(self.shape[0]), dtype)

    def _decode(self, ids: Tensor, dtype: torch.dtype) -> Tensor:
        return self._matrix.rows(ids).to(device=self._device, dtype=dtype)


class DecodedMatrix:
    """A lossless matrix on a device that has no product for it: decoded once, in the words of its own type.

    Args:
        matrix: the matrix, on the CPU.
        device: where it multiplies.

    Attributes:
        weight: all weights in their own type, shape (out_features, in_features), on the device.
    """

    def __init__(self, matrix: CodedMatrix, device: torch.device) -> None:
        self.shape = (matrix.spec.rows, matrix.spec.columns)
        assert matrix.lossless is not None and isinstance(matrix.spec.kind, LosslessKind)
        self._name = matrix.name
        words = torch.from_numpy(matrix.lossless.words(0, matrix.spec.rows, _pool()))
        self.weight = words.to(device).view(WORD_TYPES[matrix.spec.kind.type])

    def multiply(self, x: Tensor) -> Tensor:
        """Multiply: (n, in_features) -> (n, out_features) in the type of x."""
        return functional.linear(x, self.weight.to(x.dtype))

    def rows(self, ids: Tensor) -> Tensor:
        """Look up rows: integers (n,) -> float32 (n, in_features).

        Raises:
            IndexError: an id is outside of the matrix.
        """
        if ids.numel() and not bool(((ids >= 0) & (ids < self.shape[0])).all()):
            raise IndexError(f"{self._name}: a row is looked up that is outside of its {self.shape[0]} rows")
        return self.weight[ids].to(torch.float32)

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """All weights: (out_features, in_features)."""
        return self.weight.to(dtype)


def _pool() -> _core.ThreadPool:
    """The threads of the native kernels, as many as torch uses."""
    return _pool_of(torch.get_num_threads())


@functools.cache
def _pool_of(threads: int) -> _core.ThreadPool:
    return start_pool(threads)


# The threads must end before the interpreter does.
atexit.register(_pool_of.cache_clear)
