"""Products of several coded matrices with one input, in one launch: an expert's parts, and layers side by side.

Models call layers such as q_proj, k_proj and v_proj one after the other with the same tensor, and nothing says so
beforehand. Hence their first calls are watched; layers that were given the same tensor then form a group, in which the
first that is called multiplies for all, and the others find their product ready.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from entrollm.torch import operators
from entrollm.torch.backend import Matrix, Stacked, join
from entrollm.torch.cuda.launch import MAX_MATRICES

if TYPE_CHECKING:
    from entrollm.torch.modules import EntroLinear
    from entrollm.torch.weight import CodedWeight

# Vectors that a launch takes; for more, matrices are decoded, one by one.
_MOST_VECTORS = 8
# Rounds in a row whose products were not all used, after which a group multiplies apart.
_WASTED_ROUNDS = 3

_Parts = list["weakref.ref[Matrix]"]
_Moment = tuple[int, ...]


class JoinedWeights:
    """Coded matrices with the same number of columns, one below the other."""

    def __init__(self, weights: Sequence[CodedWeight]) -> None:
        self.weights = tuple(weights)
        self.rows = [weight.spec.rows for weight in weights]
        self.out_features = sum(self.rows)
        self.number = operators.register(self)
        # By the first of the opened matrices: what is joined goes when that goes, such as in a move to another device.
        self._joined: weakref.WeakKeyDictionary[Matrix, tuple[_Parts, Matrix]] = weakref.WeakKeyDictionary()

    @property
    def device(self) -> torch.device:
        """Where they multiply."""
        return self.weights[0].device

    def are_together(self) -> bool:
        """Whether all are on one device; the entries of offloaded ones come to it one matrix at a time."""
        return all(weight.device == self.device and not weight.is_offloaded for weight in self.weights)

    def matrix(self) -> Matrix:
        """The matrices, opened on their device as one."""
        parts = [weight.matrix() for weight in self.weights]
        found = self._joined.get(parts[0])
        if found is not None and all(old() is part for old, part in zip(found[0], parts, strict=True)):
            return found[1]
        joined = join(parts)
        if joined is None:
            return Stacked(parts)
        self._joined[parts[0]] = [weakref.ref(part) for part in parts], joined
        return joined

    def multiply(self, x: Tensor) -> Tensor:
        """Multiply: (..., in_features) -> (..., sum of out_features) in the type of x."""
        return operators.product(x, self, self.out_features)

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return JoinedWeights, (self.weights,)


class Slot:
    """The products that one group of a model has ready; groups take turns."""

    def __init__(self) -> None:
        # Whose, its input, the moment, and what layers have not come for yet. Set at once: threads may share a model.
        self.ready: tuple[Group, Tensor, _Moment, list[Tensor | None]] | None = None

    def empty(self) -> None:
        """Let go of products that nobody came for, unless another thread may."""
        unused = self.ready
        if unused is not None and unused[2][0] == threading.get_ident():
            unused[0].waste()
            self.ready = None

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return Slot, ()


class Group:
    """Layers that are given the same input; the first that a model calls multiplies for all.

    A product is only handed out for the very tensor that it was made from, while that has not been written to since,
    in the same thread and on the same stream; in any other case a layer multiplies by itself.
    """

    def __init__(self, joined: JoinedWeights, slot: Slot) -> None:
        self._joined = joined
        self._slot = slot
        self._wasted = 0
        for place, weight in enumerate(joined.weights):
            weight.group = (joined.number, place, tuple(joined.rows))

    def waste(self) -> None:
        """Note that products were made that nobody used; after a few times, layers multiply apart."""
        self._wasted += 1
        if self._wasted == _WASTED_ROUNDS:
            for weight in self._joined.weights:
                weight.group = None

    def product(self, weight: CodedWeight, place: int, x: Tensor) -> Tensor:
        """The product of one layer: (..., in_features) -> (..., out_features) in the type of x.

        Args:
            weight: the layer's matrix.
            place: its place in the order in which the model calls the layers.
            x: the input.
        """
        if x.requires_grad and torch.is_grad_enabled():
            return weight(x)  # type: ignore[no-any-return]
        if place == 0:
            self._slot.empty()
            return self._multiply(x) if self._serves(x) else weight(x)
        ready = self._slot.ready
        if ready is not None and ready[0] is self and ready[1] is x and ready[2] == _moment(x):
            product, ready[3][place] = ready[3][place], None
            if product is not None:
                if all(left is None for left in ready[3]):
                    self._finish()
                return product
        return weight(x)  # type: ignore[no-any-return]

    def _serves(self, x: Tensor) -> bool:
        if self._wasted >= _WASTED_ROUNDS or x.numel() > _MOST_VECTORS * x.shape[-1]:
            return False
        return not x.is_inference() and self._joined.are_together()

    def _multiply(self, x: Tensor) -> Tensor:
        first, *others = _parts(self._joined.multiply(x), self._joined.rows)
        self._slot.ready = (self, x, _moment(x), [None, *others])
        return first

    def _finish(self) -> None:
        self._slot.ready = None
        self._wasted = 0

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return Group, (self._joined, self._slot)


class Watch:
    """Layers of one parent whose first calls show which of them get the same input.

    Args:
        layers: those that may; each is watched until its group is known.
        slot: the model's.
    """

    def __init__(self, layers: Sequence[EntroLinear], slot: Slot) -> None:
        self._waiting = list(layers)
        self._slot = slot
        self._called: list[EntroLinear] = []
        self._input: Callable[[], Tensor | None] = _nothing
        self._version = 0

    def note(self, layer: EntroLinear, x: Tensor) -> None:
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
        """Make a group of the layers that were given the last input; one by itself stays alone, as does the last."""
        called, self._called, self._input = self._called, [], _nothing
        weights = JoinedWeights([layer.weight for layer in called]) if len(called) > 1 else None
        group = Group(weights, self._slot) if weights is not None and weights.are_together() else None
        for place, layer in enumerate(called):
            layer.share(group, place)
        waiting = [layer for layer in self._waiting if layer not in called]
        if len(waiting) == 1:
            waiting[0].share(None, 0)
        self._waiting = waiting

    def __getstate__(self) -> dict[str, Any]:
        # Without what is called now, which does not matter to a copy.
        return {**self.__dict__, "_called": [], "_input": _nothing}


def watch(model: nn.Module) -> None:
    """Watch the layers of a model, to find those that are given the same input."""
    from entrollm.torch.modules import EntroLinear

    slot = Slot()
    for parent in model.modules():
        by_columns: dict[int, list[EntroLinear]] = {}
        for layer in parent.children():
            if isinstance(layer, EntroLinear):
                by_columns.setdefault(layer.in_features, []).append(layer)
        for layers in by_columns.values():
            if len(layers) > 1:
                shared = Watch(layers, slot)
                for layer in layers:
                    layer.watch = shared


def _moment(x: Tensor) -> _Moment:
    """The thread, and what changes when a tensor is written to, and when work is queued elsewhere or only recorded."""
    if not x.is_cuda:
        return threading.get_ident(), x._version
    stream = torch.cuda.current_stream(x.device).cuda_stream
    return threading.get_ident(), x._version, stream, torch.cuda.is_current_stream_capturing()


class _Traced:
    """The products that a group has ready in code that is being compiled: its number, the input, and what is left."""

    ready: tuple[int, Tensor, list[Tensor | None]] | None = None


_traced = _Traced()


def traced_product(weight: CodedWeight, x: Tensor) -> Tensor:
    """The product of one layer in code that is compiled: (..., in_features) -> (..., out_features) in the type of x.

    Compiled code looks at every attribute that it depends on before each call. Hence this asks for a number alone, and
    for the rest while it is compiled. The input is taken not to be written to between the calls of a group's layers, as
    it was not when the group was found.
    """
    found_place: operators.Place = operators.place_of(weight.number)
    number, place, rows = found_place
    gradients = x.requires_grad and torch.is_grad_enabled()
    if len(rows) == 1 or gradients or x.numel() > _MOST_VECTORS * x.shape[-1]:
        return operators.observed_product(x, weight.number, rows[place])
    if place == 0:
        first, *others = _parts(operators.observed_product(x, number, sum(rows)), rows)
        _traced.ready = (number, x, [None, *others])
        return first
    ready = _traced.ready
    if ready is not None and ready[0] == number and ready[1] is x:
        found, ready[2][place] = ready[2][place], None
        if all(left is None for left in ready[2]):
            _traced.ready = None
        if found is not None:
            return found
    return operators.observed_product(x, weight.number, rows[place])


def _parts(product: Tensor, rows: Sequence[int]) -> list[Tensor]:
    """What belongs to each of several matrices."""
    return [part.contiguous() for part in torch.split(product, list(rows), dim=-1)]


def _nothing() -> None:
    """A reference to no tensor."""
