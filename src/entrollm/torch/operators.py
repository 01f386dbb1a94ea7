"""Products with coded matrices as torch operators, so that tracing and compiling see shapes and types.

A graph cannot hold a coded matrix, whose entries mean nothing without their spec. An operator therefore gets a number,
under which the object that holds the matrix is registered for as long as it lives.
"""

from __future__ import annotations

import itertools
import weakref
from typing import Any, Protocol

import torch
from torch import Tensor

from entrollm.torch.matrix import Matrix


class ExpertOperand(Protocol):
    """What operators multiply with where every vector of outputs has an expert: a stack of coded matrices."""

    def multiply_chosen(self, x: Tensor, chosen: Tensor) -> Tensor:
        """Multiply by the matrices of chosen experts; see CodedStack."""


class Operand(Protocol):
    """What operators multiply with: a coded matrix, or several of them one below the other."""

    number: int

    @property
    def out_features(self) -> int:
        """Rows of all matrices."""

    @property
    def device(self) -> torch.device:
        """The device that it multiplies on."""

    def matrix(self) -> Matrix:
        """The opened matrix."""


_operands: weakref.WeakValueDictionary[int, Operand] = weakref.WeakValueDictionary()
_experts: weakref.WeakValueDictionary[int, ExpertOperand] = weakref.WeakValueDictionary()
_numbers = itertools.count()


def register_experts(operand: ExpertOperand) -> int:
    """Give experts the number that operators know them by; no number is given twice."""
    number = next(_numbers)
    _experts[number] = operand
    return number


def register(operand: Operand) -> int:
    """Give an operand the number that operators know it by; no number is given twice."""
    number = next(_numbers)
    _operands[number] = operand
    return number


def out_features(number: int) -> int:
    """The rows of the operand that has this number."""
    return _operands[number].out_features


def is_observed(x: Tensor) -> bool:
    """Whether products with this input must be operators, because gradients, a trace, a compiler or a mode see them.

    Otherwise a direct call saves the 20 microseconds that torch's dispatcher takes.
    """
    return (
        type(x) is not Tensor
        or (x.requires_grad and torch.is_grad_enabled())
        or torch.compiler.is_compiling()
        or torch._C._get_tracing_state() is not None
        or torch._C._len_torch_dispatch_stack() > 0
    )


def multiply(x: Tensor, operand: Operand) -> Tensor:
    """Multiply without an operator: (n, in_features) -> (n, out_features) in the type and on the device of x."""
    return operand.matrix().multiply(x.to(operand.device)).to(x.device)


def product(x: Tensor, operand: Operand) -> Tensor:
    """Multiply: (..., in_features) -> (..., out_features) in the type and on the device of x."""
    if is_observed(x):
        return observed_product(x, operand.number, operand.out_features)
    return multiply(x.reshape(-1, x.shape[-1]), operand).reshape(*x.shape[:-1], operand.out_features)


def observed_product(x: Tensor, number: int, out_features: int) -> Tensor:
    """Multiply as `product` does, always by the operator, with the operand that has this number."""
    found: Tensor = linear(x.reshape(-1, x.shape[-1]), number, out_features)
    return found.reshape(*x.shape[:-1], out_features)


def look_up(ids: Tensor, operand: Operand, dtype: torch.dtype) -> Tensor:
    """Look up rows without an operator: integers (n,) -> (n, in_features) on the device of ids."""
    return operand.matrix().rows(ids.to(operand.device)).to(device=ids.device, dtype=dtype)


# Saved graphs name the operators below and their arguments.


@torch.library.custom_op("entrollm::linear", mutates_args=())
def linear(x: Tensor, weight: int, out_features: int) -> Tensor:
    """Multiply: (n, in_features) -> (n, out_features) in the type and on the device of x."""
    return multiply(x, _operands[weight])


@linear.register_fake
def _(x: Tensor, weight: int, out_features: int) -> Tensor:
    return x.new_empty((x.shape[0], out_features))


@torch.library.custom_op("entrollm::linear_backward", mutates_args=())
def linear_backward(grad: Tensor, weight: int, in_features: int) -> Tensor:
    """Multiply by the transposed matrix, decoding all of it: (n, out_features) -> (n, in_features)."""
    operand = _operands[weight]
    return (grad.to(operand.device) @ operand.matrix().dequantize(grad.dtype)).to(grad.device)


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
    """Look up rows: integers (n,) -> (n, in_features) on the device of ids."""
    return look_up(ids, _operands[weight], dtype)


@rows.register_fake
def _(ids: Tensor, weight: int, columns: int, dtype: torch.dtype) -> Tensor:
    return ids.new_empty((ids.shape[0], columns), dtype=dtype)


@torch.library.custom_op("entrollm::chosen_linear", mutates_args=())
def chosen_linear(x: Tensor, chosen: Tensor, experts: int, out_features: int) -> Tensor:
    """Multiply by the matrices of chosen experts; see CodedStack."""
    return _experts[experts].multiply_chosen(x, chosen)


@chosen_linear.register_fake
def _(x: Tensor, chosen: Tensor, experts: int, out_features: int) -> Tensor:
    return x.new_empty((chosen.numel(), out_features))
