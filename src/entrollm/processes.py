"""Processes that share a computation, each with a share of the data, as torchrun starts them."""

from __future__ import annotations

import os
from typing import Any, Protocol, TypeVar

Value = TypeVar("Value")


class Group(Protocol):
    """Processes that do the same steps at the same time. All of them must call each method, in the same order.

    Attributes:
        rank: the number of this process, from 0.
        size: how many processes there are.
        neighbors: how many of them are on this machine, this one included.
    """

    @property
    def rank(self) -> int: ...

    @property
    def size(self) -> int: ...

    @property
    def neighbors(self) -> int: ...

    def sum(self, array: Any) -> None:
        """Replace an array, of torch or NumPy, by its sum over all processes."""

    def broadcast(self, array: Any) -> None:
        """Replace a tensor by that of the first process."""

    def from_first(self, value: Value) -> Value:
        """The value that the first process gives."""

    def gather(self, value: Value) -> list[Value]:
        """The values of all processes, by rank."""

    def close(self) -> None:
        """End the group."""


class _Alone:
    """A single process."""

    rank = 0
    size = 1
    neighbors = 1

    def sum(self, array: Any) -> None:
        pass

    def broadcast(self, array: Any) -> None:
        pass

    def from_first(self, value: Value) -> Value:
        return value

    def gather(self, value: Value) -> list[Value]:
        return [value]

    def close(self) -> None:
        pass


ALONE: Group = _Alone()


def share(items: Any, group: Group) -> Any:
    """The items of this process: every n-th one of a list or an array, for n processes."""
    return items[group.rank :: group.size]


def is_shared() -> bool:
    """Whether torchrun started this process and others beside it."""
    # Some clusters set WORLD_SIZE, but torchrun alone sets the other one.
    return "TORCHELASTIC_RUN_ID" in os.environ and int(os.environ.get("WORLD_SIZE", 1)) > 1


def is_first() -> bool:
    """Whether this process is the only one, or the first of those that torchrun started."""
    return not is_shared() or os.environ.get("RANK") == "0"
