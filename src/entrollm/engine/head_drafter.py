"""Guesses by a model's own layer for guesses."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from entrollm.engine.sampling import Sampler
from entrollm.engine.speculate import Guess
from entrollm.engine.token_head import TokenHead
from entrollm.engine.weights import Floats

# Hidden states that are kept for the next guess. Of a longer prompt, the layer sees the last ones alone.
_MOST_HIDDEN = 4096


class HeadDrafter:
    """Guesses what a model's own head says, and where more than one token is asked for, what it says after that.

    Args:
        head: of the model whose text it is.
    """

    is_free = False

    def __init__(self, head: TokenHead) -> None:
        self._head = head
        self._state = head.new_state()
        self._ids: list[int] = []
        # Hidden states from position _next on, of which only those before a wrong guess are the text's.
        self._hidden: Floats | None = None
        self._next = 0
        self._length = 0  # positions in the state
        self._last: Floats | None = None  # what the head says at the end of the text

    def observe(self, start: int, hidden: Floats) -> None:
        """Take the hidden states of positions from `start` on, behind the last norm; those after them are void."""
        skipped = max(0, self._next - start)  # which the state holds already
        hidden, start = hidden[skipped:], start + skipped
        if self._hidden is not None and start <= self._next + len(self._hidden):
            hidden = np.concatenate([self._hidden[: start - self._next], hidden])
        else:
            self._next = start
        dropped = max(0, len(hidden) - _MOST_HIDDEN)
        self._hidden, self._next = hidden[dropped:], self._next + dropped

    def extend(self, tokens: Sequence[int]) -> None:
        """Go on after `tokens`; see Drafter."""
        self._ids.extend(tokens)

    def prepare(self) -> None:
        """Run the layer on the text so far."""
        self._advance()

    def guess(self, most: int, new_sampler: Callable[[], Sampler]) -> Guess:
        """Guess tokens; see Drafter. All are of one kind."""
        self._advance()
        last = self._last
        if last is None:
            return Guess()
        sampler, place = new_sampler(), self._next
        found = [sampler(self._head.logits(last)[0])]
        while len(found) < most:
            last = self._head(last, found[-1:], place, self._state)
            found.append(sampler(self._head.logits(last)[0]))
            place += 1
        self._state.truncate(self._length)
        return Guess(found)

    def _advance(self) -> None:
        """Run the layer up to the end of the text, where its hidden states are known."""
        count = len(self._ids) - 1 - self._next
        if count == 0:
            return
        self._last = None
        if self._hidden is None or not 0 < count <= len(self._hidden):
            return
        found = self._head(self._hidden[:count], self._ids[self._next + 1 :], self._next, self._state)
        self._hidden = self._hidden[count:]
        self._next += count
        self._length += count
        self._last = found[-1:]
