"""Layers that are run twice: first forward alone, then again with gradients, from inputs that waited on disk."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, MutableMapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from entrollm.calibrate.lockstep import Call, UnwalkableError
from entrollm.calibrate.store import Spool

# What a layer cannot leave anything in for other layers. None is among them.
_PLAIN = (bool, int, float, str, slice, torch.dtype, torch.device, torch.Size, type(None))
_SHARES = "layers share a {} beside their hidden states"


class _Unread(MutableMapping[Any, Any]):
    """In place of an empty mapping that a model hands to its layers: they may fill it, but not ask for anything."""

    def __setitem__(self, key: Any, value: Any) -> None:
        """Let the value go."""

    def __getitem__(self, key: Any) -> Any:
        raise UnwalkableError(_SHARES.format("mapping"))

    def __delitem__(self, key: Any) -> None:
        self[key]

    def __iter__(self) -> Iterator[Any]:
        return iter(self[None])

    def __len__(self) -> int:
        return len(self[None])


class _Node:
    """A tensor that a layer gave, and its gradient once that is known."""

    def __init__(self) -> None:
        self.gradient: Tensor | None = None

    def add(self, gradient: Tensor) -> None:
        """Add a part of the gradient."""
        self.gradient = gradient if self.gradient is None else self.gradient + gradient

    def leaf(self, given: Tensor) -> Tensor:
        """The tensor, from which gradients come here."""
        leaf = given.detach().requires_grad_()
        leaf.entrollm_node = self  # type: ignore[attr-defined]
        leaf.register_post_accumulate_grad_hook(self._take)  # type: ignore[no-untyped-call]
        return leaf

    def _take(self, leaf: Tensor) -> None:
        assert leaf.grad is not None
        self.add(leaf.grad)
        leaf.grad = None


class Visit:
    """A batch in a layer: what is needed to run the layer again, with gradients."""

    def __init__(self, call: Call, key: str, spool: Spool) -> None:
        self.batch = call.batch
        self._values, self._form = tree_flatten((call.args, call.kwargs))
        self._spool = spool
        self._waiting: dict[int, tuple[str, _Node]] = {}
        self._glued: dict[int, Tensor] = {}
        self._given: list[_Node | None] = []
        for place, value in enumerate(self._values):
            if isinstance(value, Mapping) and not value:
                self._values[place] = _Unread()
            elif not isinstance(value, (Tensor, *_PLAIN)):
                raise UnwalkableError(_SHARES.format(type(value).__name__))
            if not isinstance(value, Tensor) or not value.requires_grad:
                continue
            self._values[place] = value.detach()
            node = getattr(value, "entrollm_node", None)
            if node is None:
                self._glued[place] = value
            else:
                self._waiting[place] = f"{key}-{place}", node
                spool.put(f"{key}-{place}", value.detach())

    def forward(self, layer: Callable[..., Any]) -> Any:
        """Run the layer, and mark what it gives.

        Raises:
            UnwalkableError: it shares something with other layers through one of its arguments.
        """
        args, kwargs = tree_unflatten(self._values, self._form)
        with torch.no_grad():
            given, form = tree_flatten(layer(*args, **kwargs))
        if tree_flatten((args, kwargs))[1] != self._form:
            raise UnwalkableError(_SHARES.format("container"))
        for place in self._waiting:
            self._values[place] = None
        self._given = [_Node() if isinstance(value, Tensor) and value.is_floating_point() else None for value in given]
        marked = [value if node is None else node.leaf(value) for value, node in zip(given, self._given, strict=True)]
        return tree_unflatten(marked, form)

    def backward(self, layer: Callable[..., Any]) -> None:
        """Run the layer again, and pass gradients from what it gave to what it read."""
        values, leaves = list(self._values), {}
        for place in (*self._waiting, *self._glued):
            stored = self._spool.take(self._waiting[place][0]) if place in self._waiting else self._values[place]
            leaves[place] = stored.requires_grad_()
            values[place] = stored.clone()  # layers may change what they read
        args, kwargs = tree_unflatten(values, self._form)
        with torch.enable_grad():
            given, _ = tree_flatten(layer(*args, **kwargs))
        ends = [
            (value, node.gradient)
            for value, node in zip(given, self._given, strict=True)
            if node is not None and node.gradient is not None and value.requires_grad
        ]
        if ends:
            torch.autograd.backward([value for value, _ in ends], [gradient for _, gradient in ends])
        self._given = []
        for place, leaf in leaves.items():
            if leaf.grad is None:
                continue
            if place in self._waiting:
                self._waiting[place][1].add(leaf.grad)
            else:
                torch.autograd.backward(self._glued[place], leaf.grad, retain_graph=True)
