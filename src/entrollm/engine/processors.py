"""What changes the logits before a token is chosen from them; each processor does one thing to the whole vocabulary."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import copy
from typing import Protocol

import numpy as np

from entrollm.engine.weights import Floats


class History:
    """The tokens of one sequence so far.

    Attributes:
        seen: bool (vocab_size,): tokens of the prompt and the answer.
        counts: int32 (vocab_size,): how often the answer holds each token.
    """

    def __init__(self, vocab_size: int, prompt_ids: Sequence[int]) -> None:
        self.seen = np.zeros(vocab_size, dtype=np.bool_)
        self.seen[np.asarray(prompt_ids, dtype=np.int64)] = True
        self.counts = np.zeros(vocab_size, dtype=np.int32)

    def add(self, token: int) -> None:
        """Record a token of the answer."""
        self.seen[token] = True
        self.counts[token] += 1

    def copy(self) -> History:
        """The same tokens, with a state of their own."""
        twin = copy(self)
        twin.seen, twin.counts = self.seen.copy(), self.counts.copy()
        return twin


class LogitsProcessor(Protocol):
    """One change of the logits."""

    def __call__(self, logits: Floats, history: History, /) -> None:
        """Change float32 (vocab_size,) in place."""


class RepetitionPenalty:
    """Divides positive logits of seen tokens by the penalty and multiplies negative ones (arXiv 1909.05858)."""

    def __init__(self, penalty: float) -> None:
        self._penalty = np.float32(penalty)

    def __call__(self, logits: Floats, history: History, /) -> None:
        """Change float32 (vocab_size,) in place."""
        scores = logits[history.seen]
        logits[history.seen] = np.where(scores < 0, scores * self._penalty, scores / self._penalty)


class Penalties:
    """Subtracts from the logits of tokens that the answer holds: once, and once per occurrence."""

    def __init__(self, presence: float, frequency: float) -> None:
        self._presence = np.float32(presence)
        self._frequency = np.float32(frequency)

    def __call__(self, logits: Floats, history: History, /) -> None:
        """Change float32 (vocab_size,) in place."""
        used = np.flatnonzero(history.counts)
        logits[used] -= self._presence + self._frequency * history.counts[used].astype(np.float32)


class TokenBias:
    """Adds a number to the logits of some tokens.

    Raises:
        ValueError: a token is outside the vocabulary.
    """

    def __init__(self, biases: Mapping[int, float], vocab_size: int) -> None:
        self._ids = np.fromiter(biases.keys(), dtype=np.int64, count=len(biases))
        self._values = np.fromiter(biases.values(), dtype=np.float32, count=len(biases))
        if len(biases) and self._ids.max() >= vocab_size:
            raise ValueError(
                f"logit_bias names token {self._ids.max()}, which is outside the vocabulary of {vocab_size}"
            )

    def __call__(self, logits: Floats, history: History, /) -> None:
        """Change float32 (vocab_size,) in place."""
        logits[self._ids] += self._values
