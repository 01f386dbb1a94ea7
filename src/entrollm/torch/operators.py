"""Products with coded matrices as torch operators, so that tracing and compiling see shapes and types.

An operator gets its matrix as a number, under which the module that holds the matrix is known while it lives; entries
would be no use to a graph, since their meaning is in the spec.
"""

from __future__ import annotations

import itertools
import weakref
from typing import Any, Protocol

import torch
from torch import Tensor

from entrollm.torch.backend import Matrix

Place = tuple[int, int, tuple[int, ...]]
"""The number of matrices that share a product, a matrix's place among them, and the rows of all."""


class Operand(Protocol):
    """What operators multiply with: a coded matrix, or several one below the other."""

    number: int

    @property
    def device(self) -> torch.device:
        """Where it multiplies."""

    def matrix(self) -> Matrix:
        """The matrix, opened."""


_weights: weakref.WeakValueDictionary[int, Operand] = weakref.WeakValueDictionary()
_numbers = itertools.count()


def register(weight: Operand) -> int:
    """Give coded matrices the number that operators know them by."""
    number = next(_numbers)
    _weights[number] = weight
    return number


def is_known(number: int) -> bool:
    """Whether the matrices with a number are still there."""
    return number in _weights


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def place_of(number: int) -> Place:
    """Where the product of a coded matrix comes from. Compiled code asks while it is compiled, and not again."""
    place: Place = _weights[number].place()  # type: ignore[attr-defined]
    return place


def is_observed(x: Tensor) -> bool:
    """Whether calls with this input must go through operators: for gradients, tracing, compiling and other modes.

    Without them, a direct call spares the dispatcher's 20 microseconds.
    """
    return (
        type(x) is not Tensor
        or (x.requires_grad and torch.is_grad_enabled())
        or torch.compiler.is_compiling()
        or torch._C._get_tracing_state() is not None
        or torch._C._len_torch_dispatch_stack() > 0
    )


def multiply(x: Tensor, coded: Operand) -> Tensor:
    """Multiply, unobserved: (n, in_features) -> (n, out_features) in the type and on the device of x."""
    return coded.matrix().multiply(x.to(coded.device)).to(x.device)


def product(x: Tensor, coded: Operand, out_features: int) -> Tensor:
    """Multiply: (..., in_features) -> (..., out_features) in the type and on the device of x."""
    if is_observed(x):
        return observed_product(x, coded.number, out_features)
    return multiply(x.reshape(-1, x.shape[-1]), coded).reshape(*x.shape[:-1], out_features)


def observed_product(x: Tensor, number: int, out_features: int) -> Tensor:
    """The same through the operator, with matrices known by their number."""
    found: Tensor = linear(x.reshape(-1, x.shape[-1]), number, out_features)
    return found.reshape(*x.shape[:-1], out_features)


def look_up(ids: Tensor, coded: Operand, dtype: torch.dtype) -> Tensor:
    """Look up, unobserved: integers (n,) -> (n, in_features) on the device of ids."""
    return coded.matrix().rows(ids.to(coded.device)).to(device=ids.device, dtype=dtype)


@torch.library.custom_op("entrollm::linear", mutates_args=())
def linear(x: Tensor, weight: int, out_features: int) -> Tensor:
    """Multiply: (n, in_features) -> (n, out_features) in the type and on the device of x."""
    return multiply(x, _weights[weight])


@linear.register_fake
def _(x: Tensor, weight: int, out_features: int) -> Tensor:
    return x.new_empty((x.shape[0], out_features))


@torch.library.custom_op("entrollm::linear_backward", mutates_args=())
def linear_backward(grad: Tensor, weight: int, in_features: int) -> Tensor:
    """Multiply with the transposed matrix: (n, out_features) -> (n, in_features); decodes the whole matrix."""
    coded = _weights[weight]
    return (grad.to(coded.device) @ coded.matrix().dequantize(grad.dtype)).to(grad.device)


@linear_backward.register_fake
def _(grad: Tensor, weight: int, in_features: int) -> Tensor:
    return grad.new_empty((grad.shape[0], in_features))


def _keep(ctx: Any, inputs: tuple[Tensor, int, int], output: Tensor) -> None:
    x, ctx.weight, _ = inputs
    ctx.in_features = x.shape[1]


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
    return linear_backward(grad, ctx.weight, ctx.in_features), None, None


linear.register_autograd(_backward, setup_context=_keep)


@torch.library.custom_op("entrollm::rows", mutates_args=())
def rows(ids: Tensor, weight: int, columns: int, dtype: torch.dtype) -> Tensor:
    """Look up: integers (n,) -> (n, in_features) on the device of ids."""
    return look_up(ids, _weights[weight], dtype)


@rows.register_fake
def _(ids: Tensor, weight: int, columns: int, dtype: torch.dtype) -> Tensor:
    return ids.new_empty((ids.shape[0], columns), dtype=dtype)
