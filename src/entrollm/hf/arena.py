"""Keys and values of several sequences, held so that a model of transformers takes the next tokens of all at once."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

# Tokens that the first rows have room for.
_SMALLEST = 512


class Arena:
    """The keys and values of all layers, with one row for each sequence.

    Sequences of different lengths take a step together: each writes at its own position, and a mask hides what lies
    behind it. Row 0 takes what the padding of a batch writes.

    Attributes:
        capacity: tokens that a row has room for.
        is_moved: whether the buffers have moved since the last look; the caller clears it.
        cache: what the model is given.

    Args:
        windows: for each layer, the tokens that one sees, its own included; `None` for all.
    """

    def __init__(self, windows: Sequence[int | None]) -> None:
        self.windows = tuple(windows)
        self.capacity = _SMALLEST
        self.is_moved = False
        self._rows = 2
        self._free = [1]
        self._layers = [_Layer(self) for _ in windows]
        self.cache = Cache(layers=list(self._layers))
        # What the next call of the model writes and reads.
        self.rows: int | Tensor = 0
        self.positions: slice | Tensor = slice(0, 0)
        self.length = 0

    def new_row(self) -> int:
        """Take a row.

        Raises:
            RuntimeError: the memory does not suffice for more rows; everything stays as it was.
        """
        if not self._free:
            rows = self._rows
            self._resize(2 * rows, self.capacity)
            self._free += range(rows, 2 * rows)
        return self._free.pop()

    def free_row(self, row: int) -> None:
        """Give a row back."""
        self._free.append(row)

    def reserve(self, tokens: int) -> None:
        """Make room for sequences of `tokens` tokens.

        Raises:
            RuntimeError: the memory does not suffice; everything stays as it was.
        """
        if tokens > self.capacity:
            self._resize(self._rows, 1 << (tokens - 1).bit_length())

    def copy(self, source: int, target: int, tokens: int) -> None:
        """Copy the first tokens of a row to another one."""
        with torch.inference_mode():
            for layer in self._layers:
                layer.copy(source, target, tokens)

    def shape(self) -> tuple[int, int]:
        """Rows and tokens of the buffers."""
        return self._rows, self.capacity

    def _resize(self, rows: int, capacity: int) -> None:
        # All buffers first, since the memory may not suffice for the last of them.
        resized = [layer.resized(rows, capacity) for layer in self._layers]
        for layer, buffers in zip(self._layers, resized, strict=True):
            if buffers is not None:
                layer.keys, layer.values = buffers
        self._rows, self.capacity = rows, capacity
        self.is_moved = True


class _Layer(CacheLayerMixin):  # type: ignore[no-untyped-call]  # of __init_subclass__
    """One layer of an arena; the names of the methods are those of transformers."""

    is_sliding = False

    def __init__(self, arena: Arena) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._arena = weakref.proxy(arena)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        # Zeros, since a masked value still counts if it is not finite.
        shape = self._arena.shape()
        self.keys, self.values = (_zeros(states, *shape) for states in (key_states, value_states))
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *arguments: Any, **options: Any
    ) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        assert self.keys is not None and self.values is not None
        rows, positions, length = self._arena.rows, self._arena.positions, self._arena.length
        found = []
        for buffer, states in ((self.keys, key_states), (self.values, value_states)):
            if isinstance(rows, int):
                buffer[rows][:, positions] = states[0]
                found.append(buffer[rows : rows + 1, :, :length])
            else:
                buffer[rows, :, positions] = states[:, :, 0]
                found.append(buffer[:, :, :length].index_select(0, rows))
        return found[0], found[1]

    def get_seq_length(self) -> int:
        positions: slice | Tensor = self._arena.positions
        # With rows of different lengths there is no such number; models are given positions and masks.
        return int(positions.start) if isinstance(positions, slice) else int(self._arena.length) - 1

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self._arena.length, 0

    def get_max_length(self) -> int:
        return -1

    def copy(self, source: int, target: int, tokens: int) -> None:
        for buffer in (self.keys, self.values):
            if buffer is not None:
                buffer[target, :, :tokens] = buffer[source, :, :tokens]

    def resized(self, rows: int, capacity: int) -> tuple[Tensor, Tensor] | None:
        """Larger buffers with what these hold; None if there are none yet."""
        if self.keys is None or self.values is None:
            return None
        keys, values = (_zeros(old, rows, capacity) for old in (self.keys, self.values))
        for new, old in ((keys, self.keys), (values, self.values)):
            new[: old.shape[0], :, : old.shape[2]] = old
        return keys, values


def _zeros(like: Tensor, rows: int, capacity: int) -> Tensor:
    return like.new_zeros((rows, like.shape[1], capacity, like.shape[3]))


class ArenaCache:
    """The tokens of one sequence, whose keys and values lie in a row of an arena; see SequenceCache.

    Attributes:
        ids: the tokens seen so far.
    """

    def __init__(self, arena: Arena) -> None:
        self._arena = arena
        self._row: int | None = None
        self.ids: list[int] = []

    @property
    def length(self) -> int:
        """Tokens seen so far."""
        return len(self.ids)

    @property
    def row(self) -> int:
        """The row, which is taken when it is first asked for and given back with the cache."""
        if self._row is None:
            self._row = self._arena.new_row()
            weakref.finalize(self, self._arena.free_row, self._row)
        return self._row

    def shared(self, ids: Sequence[int]) -> int:
        """See SequenceCache."""
        pairs = zip(self.ids, ids[:-1], strict=False)
        return next((i for i, (old, new) in enumerate(pairs) if old != new), min(len(self.ids), len(ids) - 1))

    def reuse(self, ids: Sequence[int]) -> int:
        """See SequenceCache."""
        shared = self.shared(ids)
        del self.ids[shared:]
        return shared

    def fork(self, length: int) -> ArenaCache:
        """See SequenceCache."""
        twin = ArenaCache(self._arena)
        twin.ids = self.ids[:length]
        self._arena.copy(self.row, twin.row, length)
        return twin
