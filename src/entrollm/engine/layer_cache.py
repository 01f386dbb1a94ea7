"""Keys and values of one layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple, Protocol, get_args

import numpy as np
from numpy.typing import NDArray

from entrollm import _core
from entrollm.engine.state import check_arrays
from entrollm.engine.weights import Floats

CacheType = Literal["f32", "f16", "int8"]
"""How keys and values are held: as they are; in half precision; or as integers with a scale for each head and position,
of features that a Hadamard transform has mixed so that none is much larger than the others."""

CACHE_TYPES: tuple[CacheType, ...] = get_args(CacheType)

# Keys, values, and the scales of int8.
Buffers = tuple[NDArray[Any], NDArray[Any], Floats | None]

_DTYPES: dict[CacheType, type] = {"f32": np.float32, "f16": np.float16, "int8": np.int8}
_LARGEST_HALF = np.float32(65504.0)
_INITIAL_POSITIONS = 256
# Bytes of a cache line. Rows of keys are an odd number of lines apart: if they were a power of two apart, they would
# compete for the same places in a cache.
_LINE = 64
# Sequences share positions by the blocks that attention reads at once, so that sharing changes no bits.
_SHARED_BLOCK = 256


class Mix(Protocol):
    """Attention of queries over keys and values."""

    def __call__(self, queries: Floats, positions: Positions, /) -> Floats:
        """Mix values for each query; the last query stands at the last position.

        Args:
            queries: float32 (n, heads, head_dim).
            positions: what they see, n at least.
        Returns:
            float32 (n, heads * head_dim).
        """


class Positions(NamedTuple):
    """The positions of one sequence in a layer, the last ones of which are new.

    Attributes:
        tokens: how many are new, at least 1.
        keys, values: of all that the new ones may see, themselves included: views, (kv_heads, head_dim, length) and
            (kv_heads, length, head_dim) in the cache's type, valid until the cache changes.
        window: positions that a query sees, its own included; None for all.
        scales: of int8 keys and values, float32 (2, kv_heads, length); None for other types.
        earlier: keys, values and scales of the positions before, which this sequence may share with others and never
            writes.
    """

    tokens: int
    keys: NDArray[Any]
    values: NDArray[Any]
    window: int | None
    scales: Floats | None = None
    earlier: Sequence[Buffers] = ()

    def floats(self) -> tuple[Floats, Floats]:
        """The keys and values in float32; they must not be int8."""
        return self.keys.astype(np.float32, copy=False), self.values.astype(np.float32, copy=False)


class Attention(Protocol):
    """What a layer asks for attention over the tokens so far."""

    def extend(self, n: int) -> list[Positions]:
        """Add n tokens, whose keys and values the caller writes: the positions of each sequence, in their order."""

    def attend(self, queries: Floats, keys: Floats, values: Floats, mix: Mix) -> Floats:
        """Add n tokens and mix values for each.

        Args:
            queries: float32 (n, heads, head_dim).
            keys, values: float32 (n, kv_heads, head_dim).
            mix: called once for each sequence.
        Returns:
            float32 (n, heads * head_dim).
        """

    def look(self, queries: Floats, mix: Mix) -> Floats:
        """Mix values for queries at the last n positions, which have been added already.

        Args:
            queries: float32 (n, heads, head_dim).
            mix: called once for each sequence.
        Returns:
            float32 (n, heads * head_dim).
        """


class LayerCache:
    """Keys and values of one layer; with a sliding window, only those that a later token can still see.

    Args:
        kv_heads, head_dim: of the keys.
        window: positions that a token sees; None for all.
        value_dim: features of a value; None if as many as of a key.
        cache_type: how keys and values are held; int8 needs as many features of both.
        can_share: copies may share the positions that they begin with, in views of buffers that nobody writes there.

    Invariant: positions [first, first + held) lie in slots [start, start + held) of both buffers. With shared
    positions, these are [0, first), and slots before `floor` are theirs.
    """

    def __init__(
        self,
        kv_heads: int,
        head_dim: int,
        window: int | None,
        value_dim: int | None = None,
        cache_type: CacheType = "f32",
        can_share: bool = False,
    ) -> None:
        self._window = window
        self._cache_type = cache_type
        self._can_share = can_share and window is None
        self._shared: list[Buffers] = []
        self._floor = 0
        self._start = 0
        self._held = 0
        self._first = 0
        self._shape = kv_heads, head_dim, head_dim if value_dim is None else value_dim
        self._keys, self._values, self._scales = self._new_buffers(0)

    @property
    def capacity(self) -> int:
        """Positions that fit without a larger buffer."""
        return int(self._values.shape[1])

    @property
    def position_bytes(self) -> int:
        """Bytes that a position takes."""
        kv_heads, head_dim, value_dim = self._shape
        scales = 2 * kv_heads * 4 if self._scales is not None else 0
        return kv_heads * (head_dim + value_dim) * self._keys.itemsize + scales

    def append(self, keys: Floats, values: Floats) -> Positions:
        """Add n positions and return all that the new ones may see, valid until the next call.

        Args:
            keys, values: float32 (n, kv_heads, head_dim).
        """
        n = keys.shape[0]
        (positions,) = self.extend(n)
        first = positions.values.shape[1] - n
        if positions.scales is not None:
            pair = np.ascontiguousarray(keys), np.ascontiguousarray(values)
            _core.append(*pair, positions.keys, positions.values, positions.scales, _core.ThreadPool(1))
            return positions
        if self._cache_type == "f16":
            keys, values = (np.clip(each, -_LARGEST_HALF, _LARGEST_HALF) for each in (keys, values))
        positions.keys[:, :, first:] = keys.transpose(1, 2, 0)
        positions.values[:, first:] = values.transpose(1, 0, 2)
        return positions

    def extend(self, n: int) -> list[Positions]:
        """Add n positions of one sequence, whose keys and values the caller writes; see Attention."""
        if self._window is not None and self._held >= self._window:
            self._drop(self._held - self._window + 1)
        if self._start + self._held + n > self.capacity:
            self._make_room(n)
        self._held += n
        return [self._positions(n)]

    def attend(self, queries: Floats, keys: Floats, values: Floats, mix: Mix) -> Floats:
        """Add n positions of one sequence and let each look back from its own; see Attention."""
        return mix(queries, self.append(keys, values))

    def look(self, queries: Floats, mix: Mix) -> Floats:
        """Let the last n positions look back without adding any; see Attention."""
        return mix(queries, self._positions(len(queries)))

    def can_truncate(self, length: int) -> bool:
        """Whether the next token at position `length` would find all that it may see."""
        needed = 0 if self._window is None else max(0, length - self._window + 1)
        oldest = 0 if self._shared else self._first
        return oldest <= needed and length <= self._first + self._held

    def truncate(self, length: int) -> None:
        """Forget the positions from `length` on; can_truncate(length) must hold."""
        if self._shared and length < self._first:
            kept = self._copy(length)
            self._shared, self._first = kept._shared, kept._first
            self._keys, self._values, self._scales = kept._keys, kept._values, kept._scales
            self._floor, self._start, self._held = 0, kept._start, kept._held
            return
        self._held = max(0, length - self._first)
        if self._held == 0:
            self._start, self._first = self._floor, length

    def fork(self, length: int) -> LayerCache:
        """A copy of the positions before `length`; can_truncate(length) must hold."""
        whole = length // _SHARED_BLOCK * _SHARED_BLOCK
        if self._can_share and whole > self._first:
            count = whole - self._first
            self._shared.append(self._seen(slice(self._start, self._start + count)))
            self._drop(count)
            self._floor = self._start
        return self._copy(length)

    def _copy(self, length: int) -> LayerCache:
        """A copy of the positions before `length`, in buffers of its own but for whole blocks that are shared."""
        kv_heads, head_dim, value_dim = self._shape
        copy = LayerCache(kv_heads, head_dim, self._window, value_dim, self._cache_type, self._can_share)
        begin = 0  # of a shared run
        for run in self._shared:
            stop = min(begin + run[1].shape[1], length)
            whole = (stop - begin) // _SHARED_BLOCK * _SHARED_BLOCK
            if whole:
                copy._shared.append(_part(run, slice(0, whole)))
            if stop > begin + whole:  # the last positions, which end within a block
                copy._fill(_part(run, slice(whole, stop - begin)), begin + whole)
                return copy
            begin = stop
        held = max(0, length - self._first)
        copy._fill(self._seen(slice(self._start, self._start + held)), self._first if held else length)
        return copy

    def arrays(self) -> dict[str, NDArray[Any]]:
        """What the cache holds, by name, for a file."""
        keys, values, scales = self._seen(slice(self._start, self._start + self._held))
        if self._shared:
            runs = [*self._shared, (keys, values, scales)]
            keys, values = np.concatenate([run[0] for run in runs], 2), np.concatenate([run[1] for run in runs], 1)
            if scales is not None:
                scales = np.concatenate([run[2] for run in runs if run[2] is not None], 2)
        return {"keys": keys, "values": values} | ({} if scales is None else {"scales": scales})

    def restore(self, length: int, arrays: Mapping[str, NDArray[Any]]) -> None:
        """Hold what `arrays` gave after `length` positions, in an empty cache.

        Raises:
            ValueError: they do not fit.
        """
        kv_heads, head_dim, value_dim = self._shape
        held = arrays["keys"].shape[-1] if "keys" in arrays and arrays["keys"].ndim else 0
        needed = length if self._window is None else min(length, self._window - 1)
        if not needed <= held <= length:
            raise ValueError(f"it holds {held} of {length} positions, expected {needed} at least")
        shapes = {"keys": (kv_heads, head_dim, held), "values": (kv_heads, held, value_dim)}
        if self._scales is not None:
            shapes["scales"] = (2, kv_heads, held)
        check_arrays(arrays, shapes, {name: array.dtype for name, array in self.arrays().items()})
        self._fill((arrays["keys"], arrays["values"], arrays.get("scales")), length - held)

    def _fill(self, parts: Buffers, first: int) -> None:
        """Hold positions from `first` on, in an empty cache."""
        held = parts[1].shape[1]
        if held:
            self.extend(held)
            for ours, theirs in zip(self._seen(slice(0, held)), parts, strict=True):
                if ours is not None and theirs is not None:
                    ours[...] = theirs
        self._first = first

    def _positions(self, n: int) -> Positions:
        keys, values, scales = self._seen(slice(self._start, self._start + self._held))
        return Positions(n, keys, values, self._window, scales, self._shared)

    def _seen(self, places: slice) -> Buffers:
        """The keys, values and scales of some places."""
        return _part((self._keys, self._values, self._scales), places)

    def _new_buffers(self, capacity: int) -> Buffers:
        kv_heads, head_dim, value_dim = self._shape
        dtype = _DTYPES[self._cache_type]
        # Keys lie feature by feature: that is the layout in which one query against all of them is a fast product.
        keys: NDArray[Any] = np.empty((kv_heads, head_dim, capacity), dtype)
        values: NDArray[Any] = np.empty((kv_heads, capacity, value_dim), dtype)
        scales = np.empty((2, kv_heads, capacity), np.float32) if self._cache_type == "int8" else None
        return keys, values, scales

    def _drop(self, count: int) -> None:
        self._start += count
        self._first += count
        self._held -= count

    def _make_room(self, n: int) -> None:
        capacity = self.capacity
        needed = self._held + n
        # Moving within the capacity pays only if it frees about half; else a window would move at every token.
        grown = (
            capacity if 2 * needed <= capacity else _odd_lines(max(_INITIAL_POSITIONS, 2 * needed), self._keys.itemsize)
        )
        kept = self._seen(slice(self._start, self._start + self._held))
        self._keys, self._values, self._scales = self._new_buffers(grown)
        for ours, theirs in zip(self._seen(slice(0, self._held)), kept, strict=True):
            if ours is not None and theirs is not None:
                ours[...] = theirs
        self._start = self._floor = 0


def _odd_lines(positions: int, itemsize: int) -> int:
    """At least `positions`, so that a row of as many features takes an odd number of cache lines."""
    per_line = _LINE // itemsize
    return (-(-positions // per_line) | 1) * per_line


def _part(buffers: Buffers, places: slice) -> Buffers:
    """The keys, values and scales of some places."""
    keys, values, scales = buffers
    return keys[:, :, places], values[:, places], None if scales is None else scales[:, :, places]
