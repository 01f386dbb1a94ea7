"""What stands in the place of a parameter: functions, methods and operators of tensors get it decoded."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from entrollm.errors import Message, Option, UnsupportedError

# What a tensor says of itself without its values.
_FACTS = frozenset(
    {"size", "dim", "ndim", "ndimension", "numel", "nelement", "element_size", "itemsize", "nbytes", "stride", "layout"}
    | {"is_contiguous", "is_floating_point", "is_complex", "is_signed", "is_sparse", "is_quantized", "requires_grad"}
    | {"is_leaf", "grad", "grad_fn"}
)
_OPERATORS = (
    *("__matmul__", "__rmatmul__", "__mul__", "__rmul__", "__add__", "__radd__", "__sub__", "__rsub__"),
    *("__truediv__", "__rtruediv__", "__pow__", "__rpow__", "__neg__", "__abs__", "__gt__", "__ge__", "__lt__"),
    *("__le__", "__iter__"),
)
_CHANGES = ("__setitem__", "__iadd__", "__isub__", "__imatmul__", "__ipow__")
_MATMUL = frozenset({torch.matmul, torch.mm, Tensor.matmul, Tensor.mm, Tensor.__matmul__})


class CodedAttributeError(UnsupportedError, AttributeError):
    """Something of a tensor that a coded parameter does not have."""


class CodedParameter(nn.Module):
    """A module in the place of a parameter. What wants a tensor gets it decoded; it cannot be changed in place."""

    def dequantize(self) -> Tensor:
        """Decode all weights, in the shape of the parameter."""
        raise NotImplementedError

    def names(self) -> list[str]:
        """The names of its matrices in the checkpoint."""
        raise NotImplementedError

    def refuse_change(self, what: str) -> NoReturn:
        """Refuse a change in place.

        Raises:
            UnsupportedError: always; it names the tensors to keep.
        """
        names = self.names()
        raise CodedAttributeError(
            f"{names[0]}: the model uses {what} of this weight, which may change it, and coded weights are fixed",
            hint=Message("keep it in its type with {} when you compress", Option("keep", names)),
        )

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Call a torch function with coded parameters decoded."""
        if args and isinstance(args[0], CodedParameter) and _is_change(getattr(func, "__name__", "")):
            args[0].refuse_change(func.__name__)
        return _call_decoded(func, args, kwargs)

    def __getattr__(self, name: str) -> Any:
        """What only tensors have: a fact, or a method of the decoded tensor."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name.startswith("_") or not hasattr(Tensor, name):
                raise
        if name in _FACTS:
            shape, dtype = self.shape, self.dtype
            assert isinstance(shape, torch.Size) and isinstance(dtype, torch.dtype)
            return getattr(torch.empty(shape, dtype=dtype, device="meta"), name)
        if name == "data" or _is_change(name):
            self.refuse_change(name)
        return getattr(self.dequantize(), name)


def decoded(argument: Any) -> Any:
    """A coded parameter as a tensor, also inside lists and tuples; anything else as it is."""
    if isinstance(argument, list | tuple) and any(isinstance(item, CodedParameter) for item in argument):
        return type(argument)(map(decoded, argument))
    return argument.dequantize() if isinstance(argument, CodedParameter | Transposed) else argument


class Transposed:
    """A coded matrix with its axes exchanged: multiplying by it from the right is the product of a linear layer.

    Args:
        weight: the matrix; called with x, it multiplies.
    """

    def __init__(self, weight: CodedParameter) -> None:
        self._weight = weight

    @property
    def shape(self) -> torch.Size:
        """(in_features, out_features)."""
        rows, columns = self._weight.shape
        return torch.Size((columns, rows))

    def dequantize(self) -> Tensor:
        """Decode all weights: (in_features, out_features)."""
        return self._weight.dequantize().T

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Multiply with the coded matrix, or call another torch function with it decoded."""
        if func in _MATMUL and not kwargs and len(args) == 2 and isinstance(args[1], Transposed):
            x = args[0]
            if isinstance(x, Tensor) and x.shape[-1:] == args[1].shape[:1]:
                return args[1]._weight(x)
        if args and isinstance(args[0], Transposed) and _is_change(getattr(func, "__name__", "")):
            args[0]._weight.refuse_change(func.__name__)
        return _call_decoded(func, args, kwargs)

    def __getattr__(self, name: str) -> Any:
        """Anything else of a tensor: that of the decoded one."""
        if name.startswith("_") or not hasattr(Tensor, name):
            raise AttributeError(f"a transposed coded matrix has no {name!r}")
        if name == "data" or _is_change(name):
            self._weight.refuse_change(name)
        return getattr(self.dequantize(), name)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: Any) -> Tensor:
        return self.dequantize()[index]


def _call_decoded(func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any] | None) -> Any:
    return func(*map(decoded, args), **{name: decoded(argument) for name, argument in (kwargs or {}).items()})


def _is_change(name: str) -> bool:
    """Whether a method of tensors changes them in place."""
    return name in _CHANGES or (name.endswith("_") and not name.endswith("__"))


def _operator(name: str) -> Callable[..., Any]:
    def operate(self: CodedParameter | Transposed, *operands: Any) -> Any:
        return getattr(self.dequantize(), name)(*map(decoded, operands))

    operate.__name__ = name
    return operate


def _change(name: str) -> Callable[..., Any]:
    def change(self: CodedParameter, *operands: Any) -> Any:
        self.refuse_change(name)

    change.__name__ = name
    return change


for _name in _OPERATORS:
    setattr(CodedParameter, _name, _operator(_name))
    setattr(Transposed, _name, _operator(_name))
for _name in _CHANGES:
    setattr(CodedParameter, _name, _change(_name))
