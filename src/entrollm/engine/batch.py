"""Several sequences that go through the model together."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from entrollm.engine.attention import Angles
from entrollm.engine.cache import Cache
from entrollm.engine.layer_cache import LayerCache, Mix, Positions
from entrollm.engine.state import Advance, RecurrentState
from entrollm.engine.weights import Floats, Ids


class SequenceCache(Protocol):
    """What a model keeps of the tokens of one sequence."""

    @property
    def length(self) -> int:
        """Tokens seen so far."""

    def shared(self, ids: Sequence[int]) -> int:
        """The number of tokens that reuse(ids) would keep and a fork for `ids` would start with."""

    def reuse(self, ids: Sequence[int]) -> int:
        """Keep the longest usable beginning that the sequence shares with `ids`, short of its last token.

        Returns:
            The number of tokens kept; the caller runs the model on ids from there on.
        """

    def fork(self, length: int) -> SequenceCache:
        """A cache of its own that starts with the first `length` tokens of this one, at most what shared() returned."""


@dataclass(frozen=True)
class SequenceStep:
    """The next tokens of one sequence.

    Attributes:
        ids: int64 (n,), n >= 1: the tokens that follow those in the cache.
        cache: the tokens before, from new_cache() of the model that takes the step.
        needs_logits: whether the logits after the last token are wanted; they cost a row of the output head.
        observe: is given the hidden states of the tokens behind the final norm, in one or more pieces: the position
            of the first, and float32 (n, hidden_size). Position 0 comes again if the sequence has to start over.
    """

    ids: Ids
    cache: SequenceCache
    needs_logits: bool = True
    observe: Callable[[int, Floats], None] | None = None


@dataclass(frozen=True)
class Segment:
    """Consecutive tokens of one sequence in a pass through the layers.

    Attributes:
        index: number of the sequence in its step.
        ids: int64 (n,), n >= 1.
        cache: the tokens before.
    """

    index: int
    ids: Ids
    cache: Cache


def passes(segments: Sequence[Segment], most: int) -> Iterator[list[Segment]]:
    """Cut the tokens of all segments, in order, into passes of at most `most` tokens."""
    current: list[Segment] = []
    room = most
    for segment in segments:
        start = 0
        while start < len(segment.ids):
            taken = segment.ids[start : start + room]
            current.append(Segment(segment.index, taken, segment.cache))
            start += len(taken)
            room -= len(taken)
            if room == 0:
                yield current
                current, room = [], most
    if current:
        yield current


def joined_angles(rows: Sequence[list[Angles | None]]) -> list[Angles | None]:
    """The angles of each layer for the rows of several sequences, one behind the other."""
    found: dict[int, Angles] = {}  # many layers share theirs
    joined: list[Angles | None] = []
    for layers in zip(*rows, strict=True):
        angles = [each for each in layers if each is not None]
        if angles and id(angles[0]) not in found:
            factors = [each.query_factors for each in angles if each.query_factors is not None]
            found[id(angles[0])] = Angles(
                np.concatenate([each.cosines for each in angles]),
                np.concatenate([each.sines for each in angles]),
                np.concatenate(factors) if factors else None,
            )
        joined.append(found[id(angles[0])] if angles else None)
    return joined


class SequencesState:
    """What one layer keeps, where each sequence of a pass looks back on its own tokens.

    Args:
        segments: what the rows of the pass are.
        layer: number of the layer.
    """

    def __init__(self, segments: Sequence[Segment], layer: int) -> None:
        self._states = [segment.cache.layers[layer] for segment in segments]
        self._ends = np.cumsum([len(segment.ids) for segment in segments]).tolist()

    def extend(self, n: int) -> list[Positions]:
        """Add each sequence's rows, n in all, to its cache; see Attention."""
        starts = [0, *self._ends]
        return [
            positions
            for cache, start, end in zip(self._caches(), starts, self._ends, strict=False)
            for positions in cache.extend(end - start)
        ]

    def attend(self, queries: Floats, keys: Floats, values: Floats, mix: Mix) -> Floats:
        """Add each sequence's rows to its cache and mix values for them; see Attention."""
        parts = []
        start = 0
        for cache, end in zip(self._caches(), self._ends, strict=True):
            parts.append(cache.attend(queries[start:end], keys[start:end], values[start:end], mix))
            start = end
        return np.concatenate(parts)

    def look(self, queries: Floats, mix: Mix) -> Floats:
        """Mix values for the rows that each sequence has added already; see Attention."""
        starts = [0, *self._ends]
        parts = [
            cache.look(queries[start:end], mix)
            for cache, start, end in zip(self._caches(), starts, self._ends, strict=False)
        ]
        return np.concatenate(parts)

    def advance(self, rows: Sequence[Floats], step: Advance) -> Floats:
        """Bring each sequence's state forward by its rows; see Recurrence."""
        parts = []
        start = 0
        for state, end in zip(self._states, self._ends, strict=True):
            assert isinstance(state, RecurrentState)  # the layer's own part asks for what the layer keeps
            parts.append(state.advance([part[start:end] for part in rows], step))
            start = end
        return np.concatenate(parts)

    def _caches(self) -> list[LayerCache]:
        """The caches of a layer that keeps keys and values."""
        return [state for state in self._states if isinstance(state, LayerCache)]
