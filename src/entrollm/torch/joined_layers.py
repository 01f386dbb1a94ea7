"""Layers that are given the same input: the first one that a model calls multiplies for all of them.

Models call layers such as q_proj, k_proj and v_proj one after another with the same tensor, but nothing announces it.
The first calls of layers are therefore watched, and layers that were given the same tensor are joined from then on.
This module alone knows which layers are joined, and hands out their products.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Sequence
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor

from entrollm.torch import operators
from entrollm.torch.cuda.launch import MAX_MATRICES
from entrollm.torch.joined_weights import JoinedWeights, split_product
from entrollm.torch.weight import CodedWeight

# Vectors that one launch takes. For more, each matrix is decoded by itself.
_MAX_VECTORS = 8
# Times in a row that not all products were used, after which layers multiply alone again.
_MAX_WASTED = 3

_Owner = TypeVar("_Owner")
_Moment = tuple[int, ...]


class Layer(Protocol):
    """A layer whose product may come from joined layers."""

    weight: CodedWeight
    joining: Watch | JoinedLayers | None
    """What makes its product: `None` if the layer always multiplies alone."""


class ReadyProducts(Generic[_Owner]):
    """Products that were made together and that not all layers have taken yet; a model has at most one such set."""

    def __init__(self) -> None:
        # The owner, the input, its moment, and the products, None where taken. One assignment replaces all of it,
        # because threads may share a model.
        self.current: tuple[_Owner, Tensor, _Moment, list[Tensor | None]] | None = None

    def put(self, owner: _Owner, x: Tensor, moment: _Moment, products: list[Tensor | None]) -> None:
        """Offer products of one input."""
        self.current = (owner, x, moment, products)

    def take(self, owner: _Owner, x: Tensor, moment: _Moment, index: int) -> Tensor | None:
        """Take a product, or `None` if it is not there for this owner, this very tensor and this moment."""
        current = self.current
        if current is None or current[0] != owner or current[1] is not x or current[2] != moment:
            return None
        product, current[3][index] = current[3][index], None
        if all(left is None for left in current[3]):
            self.current = None
        return product

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return ReadyProducts, ()


class JoinedLayers:
    """Layers that are given the same input, in the order in which the model calls them.

    A product is only handed out for the very tensor that it was made from, if that has not been written to since, in
    the same thread and on the same stream. In any other case the layer multiplies alone.
    """

    def __init__(self, weights: JoinedWeights, ready: ReadyProducts[JoinedLayers]) -> None:
        self.weights = weights
        self._ready = ready
        self._wasted = 0
        self.index = {weight.number: index for index, weight in enumerate(weights.weights)}
        """The index of each layer by its weight's number."""
        for number in self.index:
            _joined_layers[number] = self

    @property
    def is_useful(self) -> bool:
        """Whether products made for all layers have been used by all of them, at least now and then."""
        return self._wasted < _MAX_WASTED

    def product(self, layer: Layer, x: Tensor) -> Tensor:
        """The product of one of the layers: (..., in_features) -> (..., out_features) in the type of x."""
        weight = layer.weight
        index = self.index.get(weight.number)
        if index is None or (x.requires_grad and torch.is_grad_enabled()):
            return weight(x)  # type: ignore[no-any-return]
        if index == 0:
            self._drop_unused()
            return self._multiply_for_all(x) if self._can_serve(x) else weight(x)
        product = self._ready.take(self, x, _moment(x), index)
        if product is None:
            return weight(x)  # type: ignore[no-any-return]
        if self._ready.current is None:
            self._wasted = 0
        return product

    def _drop_unused(self) -> None:
        """Drop products that nobody took, unless another thread may still take them."""
        unused = self._ready.current
        if unused is not None and unused[2][0] == threading.get_ident():
            unused[0]._wasted += 1
            self._ready.current = None

    def _can_serve(self, x: Tensor) -> bool:
        if not self.is_useful or x.numel() > _MAX_VECTORS * x.shape[-1]:
            return False
        return not x.is_inference() and self.weights.are_together()

    def _multiply_for_all(self, x: Tensor) -> Tensor:
        first, *others = self.weights.split(self.weights.multiply(x))
        self._ready.put(self, x, _moment(x), [None, *others])
        return first

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return JoinedLayers, (self.weights, self._ready)


# The joined layers that each weight belongs to, by the weight's number.
_joined_layers: weakref.WeakValueDictionary[int, JoinedLayers] = weakref.WeakValueDictionary()


class Watch:
    """Layers of one parent whose first calls show which of them are given the same input.

    Args:
        layers: layers that may be; each is watched until that is known.
        ready: the model's.
    """

    def __init__(self, layers: Sequence[Layer], ready: ReadyProducts[JoinedLayers]) -> None:
        self._waiting = list(layers)
        self._ready = ready
        self._called: list[Layer] = []
        self._input: Callable[[], Tensor | None] = _nothing
        self._version = 0

    def product(self, layer: Layer, x: Tensor) -> Tensor:
        """The product of a watched layer: (..., in_features) -> (..., out_features) in the type of x."""
        self._note(layer, x)
        if isinstance(layer.joining, JoinedLayers):
            return layer.joining.product(layer, x)
        return layer.weight(x)  # type: ignore[no-any-return]

    def _note(self, layer: Layer, x: Tensor) -> None:
        """Note that a layer is given an input."""
        if operators.is_observed(x) or x.is_inference():
            return
        if self._input() is not x or self._version != x._version or layer in self._called:
            self._settle()
            self._input, self._version = weakref.ref(x), x._version
        if layer in self._waiting:
            self._called.append(layer)
        if len(self._called) in (len(self._waiting), MAX_MATRICES):
            self._settle()

    def _settle(self) -> None:
        """Join the layers that were given the last input. A single one stays alone, as does the last that waits."""
        called, self._called, self._input = self._called, [], _nothing
        weights = JoinedWeights([layer.weight for layer in called]) if len(called) > 1 else None
        joined = JoinedLayers(weights, self._ready) if weights is not None and weights.are_together() else None
        for layer in called:
            layer.joining = joined
        waiting = [layer for layer in self._waiting if layer not in called]
        if len(waiting) == 1:
            waiting[0].joining = None
        self._waiting = waiting

    def __getstate__(self) -> dict[str, Any]:
        # A copy starts between two inputs.
        return {**self.__dict__, "_called": [], "_input": _nothing}


def _moment(x: Tensor) -> _Moment:
    """The thread, and what changes when a tensor is written to or when work is queued elsewhere or only recorded."""
    if not x.is_cuda:
        return threading.get_ident(), x._version
    stream = torch.cuda.current_stream(x.device).cuda_stream
    return threading.get_ident(), x._version, stream, torch.cuda.is_current_stream_capturing()


def _nothing() -> None:
    """A weak reference to no tensor."""


# What makes a weight's product in compiled code: an operand's number, the weight's index among those that the operand
# multiplies with, and the rows of each of these.
_Source = tuple[int, int, tuple[int, ...]]

# Products that are ready in code that is being compiled, owned by the number of their joined weights.
_compiled: ReadyProducts[int] = ReadyProducts()


def compiled_product(weight: CodedWeight, x: Tensor) -> Tensor:
    """The product of one layer in code that is being compiled; otherwise as `JoinedLayers.product`.

    Compiled code checks every attribute that it depends on before each call. This function therefore reads the weight's
    number alone, and looks up the rest while it is compiled. It assumes that the input is not written to between the
    calls of joined layers, as it was not when they were joined.
    """
    source: _Source = _source_of(weight.number)
    number, index, rows = source
    needs_gradient = x.requires_grad and torch.is_grad_enabled()
    if len(rows) == 1 or needs_gradient or x.numel() > _MAX_VECTORS * x.shape[-1]:
        return operators.observed_product(x, weight.number, rows[index])
    if index == 0:
        first, *others = split_product(operators.observed_product(x, number, sum(rows)), rows)
        _compiled.put(number, x, (), [None, *others])
        return first
    product = _compiled.take(number, x, (), index)
    return operators.observed_product(x, weight.number, rows[index]) if product is None else product


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _source_of(number: int) -> _Source:
    joined = _joined_layers.get(number)
    if joined is None or not joined.is_useful:
        return number, 0, (operators.out_features(number),)
    return joined.weights.number, joined.index[number], tuple(joined.weights.rows)
