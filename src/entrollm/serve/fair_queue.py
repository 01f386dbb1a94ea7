"""A bounded queue in which clients take turns."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Hashable, Sequence
from typing import Generic, TypeVar

Item = TypeVar("Item")


class QueueFullError(Exception):
    """The queue has no room for what should be added."""


class FairQueue(Generic[Item]):
    """Items wait in one line per client, and the clients take turns.

    Args:
        most: items that may wait at a time.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._length = 0
        # In the order of their turns.
        self._lines: dict[Hashable, deque[Item]] = {}

    def __len__(self) -> int:
        return self._length

    def add(self, client: Hashable, items: Sequence[Item]) -> None:
        """Add all items to the client's line.

        Raises:
            QueueFullError: there is no room for all of them; none is added.
        """
        if self._length + len(items) > self._most:
            raise QueueFullError
        self._lines.setdefault(client, deque()).extend(items)
        self._length += len(items)

    def take(self, fits: Callable[[Item], bool]) -> Item | None:
        """Remove the first item of the next client in turn whose first item fits; `None` if none does."""
        for client, line in self._lines.items():
            if fits(line[0]):
                item = line.popleft()
                self._length -= 1
                del self._lines[client]
                if line:
                    self._lines[client] = line  # behind the other clients
                return item
        return None

    def remove(self, unwanted: Callable[[Item], bool]) -> list[Item]:
        """Remove and return all unwanted items."""
        removed = []
        for client, line in list(self._lines.items()):
            removed += [item for item in line if unwanted(item)]
            kept = deque(item for item in line if not unwanted(item))
            if kept:
                self._lines[client] = kept
            else:
                del self._lines[client]
        self._length -= len(removed)
        return removed
