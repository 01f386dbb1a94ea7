"""Coded matrices in the place of a three-dimensional parameter."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from entrollm.torch.joined_weights import JoinedWeights
from entrollm.torch.parameter import CodedParameter, decoded
from entrollm.torch.weight import CodedWeight


class CodedStack(CodedParameter):
    """Coded matrices in the place of a three-dimensional parameter, such as the fused weights of experts.

    Matrix `i` of the parameter is `stack[i]`. It may be stored in parts that lie one below the other.

    Args:
        matrices: the parts of each matrix.
        is_transposed: whether the parameter has the transposes of these matrices.
    """

    def __init__(self, matrices: Sequence[Sequence[CodedWeight]], *, is_transposed: bool = False) -> None:
        super().__init__()
        self.is_transposed = is_transposed
        for index, parts in enumerate(matrices):
            self.add_module(str(index), nn.ModuleList(parts))
        self._joined: dict[int, JoinedWeights] = {}

    def multiply(self, index: int, x: Tensor) -> Tensor:
        """Multiply by one matrix as it is stored: (n, in_features) -> (n, out_features)."""
        if index not in self._joined:
            self._joined[index] = JoinedWeights(self.parts(index))
        joined = self._joined[index]
        return joined.multiply(x) if joined.are_together() else torch.cat([part(x) for part in joined.weights], dim=-1)

    def __getitem__(self, index: Any) -> Tensor:
        """Decode one matrix of the parameter, or all of them where the index is not one of theirs."""
        is_one = isinstance(index, int) or (isinstance(index, Tensor) and index.ndim == 0)
        if not is_one:
            return self.dequantize()[decoded(index)]
        matrix = torch.cat([part.dequantize() for part in self.parts(range(len(self))[int(index)])])
        return matrix.T if self.is_transposed else matrix

    def dequantize(self) -> Tensor:
        """Decode all matrices, in the shape of the parameter."""
        return torch.stack([self[index] for index in range(len(self))])

    def names(self) -> list[str]:
        """The names of its matrices in the checkpoint."""
        return [part.name for index in range(len(self)) for part in self.parts(index)]

    def __len__(self) -> int:
        return len(self._modules)

    @property
    def out_features(self) -> int:
        """Rows of each matrix."""
        return sum(part.spec.rows for part in self.parts(0))

    @property
    def in_features(self) -> int:
        """Columns of each matrix."""
        return self.parts(0)[0].spec.columns

    @property
    def shape(self) -> torch.Size:
        """That of the parameter: (matrices, out_features, in_features), or the latter two the other way round."""
        return torch.Size((len(self), *((self.in_features, self.out_features)[:: 1 if self.is_transposed else -1])))

    @property
    def device(self) -> torch.device:
        """The device that it multiplies on."""
        return self.parts(0)[0].device

    @property
    def dtype(self) -> torch.dtype:
        """The type of its decoded matrices."""
        return self.parts(0)[0].dtype

    def parts(self, index: int) -> list[CodedWeight]:
        """The coded matrices that lie one below the other in matrix `index`."""
        parts = self._modules[str(index)]
        assert isinstance(parts, nn.ModuleList)
        return [part for part in parts if isinstance(part, CodedWeight)]
