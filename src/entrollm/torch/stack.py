"""Coded matrices in the place of a three-dimensional parameter."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from entrollm.torch import operators
from entrollm.torch.backend import join_experts
from entrollm.torch.cuda import ExpertMatrices
from entrollm.torch.joined_weights import JoinedWeights
from entrollm.torch.matrix import Matrix
from entrollm.torch.parameter import CodedParameter, decoded
from entrollm.torch.weight import CodedWeight

_MatrixRefs = list[tuple[CodedWeight, "weakref.ref[Matrix]"]]
# Attributes that belong to one object and are made anew in its copies.
_NOT_COPIED = ("number", "_together")


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
        self._begin()

    def _begin(self) -> None:
        self.number = operators.register_experts(self)
        # All matrices as one, beside the opened matrices that it was made from. The first of these is the key, so that
        # it is dropped when that one is, as in a move to another device.
        self._together: weakref.WeakKeyDictionary[Matrix, tuple[_MatrixRefs, ExpertMatrices[Any] | None]]
        self._together = weakref.WeakKeyDictionary()

    def multiply(self, index: int, x: Tensor) -> Tensor:
        """Multiply by one matrix as it is stored: (n, in_features) -> (n, out_features)."""
        if index not in self._joined:
            self._joined[index] = JoinedWeights(self.parts(index))
        joined = self._joined[index]
        return joined.multiply(x) if joined.are_together() else torch.cat([part(x) for part in joined.weights], dim=-1)

    def is_together(self, dtype: torch.dtype) -> bool:
        """Whether one launch on a GPU multiplies vectors of a type by several experts."""
        together = self._on_gpu()
        return together is not None and together.takes(1, 1, dtype)

    def _on_gpu(self) -> ExpertMatrices[Any] | None:
        """All matrices as one, if they are in one form and on one GPU."""
        first = self.parts(0)[0]
        if first.device.type != "cuda" or first.is_offloaded:
            return None
        key = first.matrix()
        made = self._together.get(key)
        if made is None or any(weight.opened is None or matrix() is not weight.opened for weight, matrix in made[0]):
            experts = [self.parts(index) for index in range(len(self))]
            weights = [weight for parts in experts for weight in parts]
            joined = None
            if all(weight.device == first.device and not weight.is_offloaded for weight in weights):
                joined = join_experts([[weight.matrix() for weight in parts] for parts in experts])
            refs = [(weight, weakref.ref(weight.matrix())) for weight in weights] if joined is not None else []
            made = self._together[key] = refs, joined
        return made[1]

    def multiply_chosen(self, x: Tensor, chosen: Tensor) -> Tensor:
        """Multiply by the matrices, as they are stored, of chosen experts.

        Args:
            x: (inputs, in_features): one input for each token, or for each choice.
            chosen: integers (tokens, choices), the experts of each token; numbers that no expert has mean none.
        Returns:
            (tokens * choices, out_features) in the type of x, with zeros where no expert is chosen.
        """
        if operators.is_observed(x):
            found: Tensor = operators.chosen_linear(x, chosen, self.number, self.out_features)
            return found
        together = self._on_gpu()
        tokens, choices = chosen.shape
        if together is not None and together.takes(tokens, choices, x.dtype):
            return together.multiply(x, chosen)
        product = x.new_zeros(chosen.numel(), self.out_features)
        for expert in torch.unique(chosen).tolist():
            if 0 <= expert < len(self):
                (places,) = torch.where(chosen.reshape(-1) == expert)
                product[places] = self.multiply(expert, x[places // (chosen.numel() // len(x))])
        return product

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

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key not in _NOT_COPIED}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._begin()
