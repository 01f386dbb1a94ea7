"""See the products of a model with its matrices, whatever its code calls them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten

from entrollm.calibrate.network import Matrix, Network

# Where the inputs and the matrix are among the arguments. That of `linear` is (out, in), those of others (in, out).
_LINEAR = functional.linear
_PRODUCTS: dict[Any, tuple[int, int]] = {
    _LINEAR: (0, 1),
    torch.matmul: (0, 1),
    torch.Tensor.matmul: (0, 1),
    torch.Tensor.__matmul__: (0, 1),
    torch.mm: (0, 1),
    torch.Tensor.mm: (0, 1),
    torch.addmm: (1, 2),
    torch.Tensor.addmm: (1, 2),
}


_ADDITIONS = frozenset({"add", "add_", "__add__", "__iadd__", "__radd__"})

Stream = tuple[str, int]
"""A tensor that a layer adds something to: its n-th argument ("input", n) or the result of an addition ("sum", n)."""


class Watcher(Protocol):
    """What is told of products."""

    def product(self, matrix: Matrix, x: Tensor, is_transposed: bool, multiply: Callable[[], Tensor]) -> Tensor:
        """Return what `multiply` gives: (..., outputs) of x (..., inputs).

        Args:
            matrix: what x is multiplied with.
            x: its inputs.
            is_transposed: whether the matrix is stored as (inputs, outputs).
            multiply: computes the product.
        """

    def look_up(self, matrix: Matrix, ids: Tensor, rows: Tensor) -> None:
        """Rows `ids` of a matrix were looked up."""

    def add(self, first: Tensor, second: Tensor, total: Tensor) -> None:
        """Two tensors of one shape were added up."""


class Watch(TorchFunctionMode):
    """While it is entered, products with the loaded matrices of a network are reported.

    Args:
        network: the network.
        watcher: what is told.
    """

    def __init__(self, network: Network, watcher: Watcher) -> None:
        super().__init__()
        self._network = network
        self._watcher = watcher

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Call a function of torch, and report it if it is a product with a matrix, a look-up or an addition."""
        kwargs = kwargs or {}
        if func is functional.embedding:
            return self._embedding(args, kwargs)
        if func is functional.dropout and not kwargs.get("training", args[2] if len(args) > 2 else True):
            return args[0]  # the same tensor, so that it is known when it is added
        places = _PRODUCTS.get(func)
        if places is not None and len(args) > places[1] and isinstance(args[places[1]], Tensor):
            return self._product(func, places, args, kwargs)
        result = func(*args, **kwargs)
        is_sum = getattr(func, "__name__", "") in _ADDITIONS and len(args) > 1 and isinstance(args[1], Tensor)
        if is_sum and args[0].shape == args[1].shape:
            self._watcher.add(args[0], args[1], result)
        return result

    def _product(
        self, func: Callable[..., Any], places: tuple[int, int], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        weight = args[places[1]]
        matrix = self._network.matrix_at(weight)
        if matrix is None:
            return func(*args, **kwargs)
        is_stored = tuple(weight.shape) == matrix.shape and (weight.stride(-1) == 1 or weight.shape[-1] == 1)
        is_transposed = is_stored == (func is not _LINEAR)
        return self._watcher.product(matrix, args[places[0]], is_transposed, lambda: func(*args, **kwargs))

    def _embedding(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        rows: Tensor = functional.embedding(*args, **kwargs)
        matrix = self._network.matrix_at(args[1])
        if matrix is not None:
            if torch.is_grad_enabled():
                rows = rows.detach().requires_grad_()
            self._watcher.look_up(matrix, args[0], rows)
        return rows


class Streams:
    """Finds what the outputs of matrices are added to, while a layer runs.

    Attributes:
        found: for each matrix whose output is added to something, what that is.
    """

    def __init__(self) -> None:
        self.found: dict[str, Stream] = {}
        self._tensors: dict[Stream, Tensor] = {}
        self._products: list[tuple[str, Tensor]] = []

    def enter(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A layer begins."""
        values, _ = tree_flatten((args, kwargs))
        self._tensors = {("input", place): value for place, value in enumerate(values) if isinstance(value, Tensor)}
        self._products.clear()

    def leave(self) -> None:
        """Let go of all tensors."""
        self._tensors.clear()
        self._products.clear()

    def product(self, name: str, y: Tensor) -> None:
        """A matrix gave y."""
        self._products.append((name, y))

    def add(self, first: Tensor, second: Tensor, total: Tensor) -> None:
        """Two tensors were added up."""
        for y, other in ((first, second), (second, first)):
            name = next((name for name, given in self._products if given is y), None)
            if name is None:
                continue
            stream = next((stream for stream, tensor in self._tensors.items() if tensor is other), None)
            if stream is not None:
                self.found.setdefault(name, stream)
            self._tensors["sum", sum(kind == "sum" for kind, _ in self._tensors)] = total
            return

    def tensor(self, stream: Stream | None) -> Tensor | None:
        """The tensor that a stream is in this run of the layer, or None if it is unknown."""
        return None if stream is None else self._tensors.get(stream)
