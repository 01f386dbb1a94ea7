"""Guesses of the next tokens, which the model checks in one pass instead of making them one by one.

The model's sampler chooses every token, as it would without guesses: a guess only tells which tokens to run before it
is known that they are chosen. The rule of speculative sampling (arXiv 2211.17192) comes to the same where a guess is a
single sequence: it is accepted with the probability that the model gives it, and else replaced by one of the others.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from entrollm.engine.answer import AnswerText
from entrollm.engine.cache import Cache, Mark
from entrollm.engine.decoder import Decoder
from entrollm.engine.pace import LENGTHS, Pace
from entrollm.engine.sampling import Sampler
from entrollm.engine.weights import Floats

# Tokens of the text whose continuation elsewhere is taken for a guess: the more agree, the likelier it is right.
_SHORTEST, _LONGEST = 2, 4
# Tokens before these that agree too make a kind of their own, from either number on.
_LONG = (6, 12)
# The start of a text whose cache can go back as it is.
_START = Mark(0, {})


@dataclass(frozen=True)
class Guess:
    """Tokens that may come next.

    Attributes:
        tokens: the guessed ids.
        kind: how much there is to say for them, from 0; guesses of a kind are about equally often right.
    """

    tokens: Sequence[int] = field(default_factory=list)
    kind: int = 0


class Drafter(Protocol):
    """What guesses tokens.

    Attributes:
        is_free: whether a guess takes no time worth mentioning.
    """

    is_free: bool

    @property
    def observe(self) -> Callable[[int, Floats], None] | None:
        """Is given the hidden states of all tokens that the model runs; see SequenceStep. None if it needs none."""

    def extend(self, tokens: Sequence[int]) -> None:
        """Go on after `tokens`, which are the text's."""

    def prepare(self) -> None:
        """Do what a first guess after a long prompt would have to do."""

    def guess(self, most: int, new_sampler: Callable[[], Sampler]) -> Guess:
        """Guess at most `most` tokens.

        Args:
            most: at least 1.
            new_sampler: makes one that chooses as the model's own will, as long as it is given the same logits.
        """


class NgramDrafter:
    """Guesses that the text goes on as it did after the last occurrence of its last tokens."""

    is_free = True
    observe = None

    def __init__(self) -> None:
        self._ids: list[int] = []
        # Where the text went on after each sequence of tokens, by its length.
        self._next: dict[int, dict[tuple[int, ...], int]] = {size: {} for size in range(_SHORTEST, _LONGEST + 1)}

    def extend(self, tokens: Sequence[int]) -> None:
        """Go on after `tokens`; see Drafter."""
        ids = self._ids
        for token in tokens:
            for size, places in self._next.items():
                if len(ids) >= size:
                    places[tuple(ids[-size:])] = len(ids)
            ids.append(token)

    def prepare(self) -> None:
        """Do nothing."""

    def guess(self, most: int, new_sampler: Callable[[], Sampler] | None = None) -> Guess:
        """Guess tokens; see Drafter. The kind grows with the number of tokens that agree."""
        for size in range(_LONGEST, _SHORTEST - 1, -1):
            place = self._next[size].get(tuple(self._ids[-size:]))
            if place is not None:
                kind = size - _SHORTEST
                if size == _LONGEST:
                    agreeing = self._agreeing(place)
                    kind += sum(agreeing >= least for least in _LONG)
                return Guess(self._from(place, most), kind)
        return Guess()

    def _agreeing(self, place: int) -> int:
        """How many tokens before a place are those at the end of the text, as far as it matters."""
        found = _LONGEST
        while found < min(place, _LONG[-1]) and self._ids[place - 1 - found] == self._ids[-1 - found]:
            found += 1
        return found

    def _from(self, place: int, count: int) -> list[int]:
        """The tokens from a place on, which repeat where they reach the end of the text."""
        found = self._ids[place : place + count]
        while len(found) < count:
            found.append(found[len(found) - (len(self._ids) - place)])
        return found


class ModelDrafter:
    """Guesses what a smaller model would say.

    Args:
        decoder: the smaller model, whose layers keep no states.
        vocab_size: logits of the model that is guessed for; the smaller one's may be padded to another number. Tokens
            that one of them lacks are not guessed, and nothing is once the text holds one that the smaller one lacks.
    """

    is_free = False
    observe = None

    def __init__(self, decoder: Decoder, vocab_size: int) -> None:
        self._decoder = decoder
        self._vocab_size = vocab_size
        self._cache = decoder.new_cache()
        self._ids: list[int] = []
        self._knows_all = True

    def extend(self, tokens: Sequence[int]) -> None:
        """Go on after `tokens`; see Drafter."""
        for token in tokens:
            self._knows_all = self._knows_all and token < self._decoder.config.vocab_size
            place = len(self._ids)
            if place < self._cache.length and self._cache.ids[place] != token:
                self._cache.rewind(place, _START)
            self._ids.append(token)

    def prepare(self) -> None:
        """Run the smaller model on the text, all but its last token."""
        if self._has_room(1) and len(self._ids) > self._cache.length + 1:
            self._forward(self._ids[self._cache.length : -1])

    def guess(self, most: int, new_sampler: Callable[[], Sampler]) -> Guess:
        """Guess tokens; see Drafter. All are of one kind."""
        if not self._has_room(most):
            return Guess()
        # The last token is run again where the smaller model has guessed it.
        self._cache.rewind(min(self._cache.length, len(self._ids) - 1), _START)
        found: list[int] = []
        sampler = new_sampler()
        ids = self._ids[self._cache.length :]
        while len(found) < most:
            token = sampler(self._forward(ids))
            if token >= self._decoder.config.vocab_size:
                break
            found.append(token)
            ids = [token]
        return Guess(found)

    def _has_room(self, tokens: int) -> bool:
        """Whether the smaller model takes the text and that many tokens more without starting over."""
        length = len(self._ids)
        fits = self._knows_all and length + tokens <= self._decoder.config.context_length
        return fits and self._decoder.keeps_rotations(length, length + tokens)

    def _forward(self, ids: Sequence[int]) -> Floats:
        """The logits after `ids`, as many as the larger model has: float32 (vocab_size,)."""
        logits: Floats = self._decoder.forward(np.array(ids, dtype=np.int64), self._cache, last=1)[0]
        missing = self._vocab_size - len(logits)
        if missing > 0:
            return np.concatenate([logits, np.full(missing, -np.inf, dtype=np.float32)])
        return logits[: self._vocab_size]


class Forward(Protocol):
    """Runs the model on the next tokens of a sequence."""

    def __call__(self, ids: Sequence[int], /, *, last: int) -> Floats:
        """The logits after the last tokens: float32 (last, vocab_size)."""


class Speculation:
    """Makes the tokens of one answer, several in a pass where guesses of them are right.

    Attributes:
        guessed: how many tokens were guessed and run so far.
        right: how many of them were chosen.

    Args:
        drafter: guesses.
        ids: the tokens so far, of which the cache lacks the last one.
        decoder: the model.
        cache: of the sequence.
        forward: runs the model on it.
    """

    def __init__(self, drafter: Drafter, ids: Sequence[int], decoder: Decoder, cache: Cache, forward: Forward) -> None:
        self.guessed = self.right = 0
        self._drafter = drafter
        self._ids = list(ids)
        self._decoder = decoder
        self._cache = cache
        self._forward = forward
        self._pace = Pace(drafter.is_free)
        drafter.extend(ids)
        drafter.prepare()

    @property
    def pending(self) -> list[int]:
        """The tokens that the cache lacks, the last one at least."""
        return self._ids[self._cache.length :]

    def follow(self, pending: Sequence[int]) -> None:
        """Go on after tokens that were made without guesses.

        Args:
            pending: those that the cache lacks.
        """
        cache, known = self._cache, len(self._ids)
        new = [*cache.ids[known:], *pending[max(0, known - cache.length) :]]
        self._ids += new
        self._drafter.extend(new)

    def step(self, text: AnswerText) -> list[tuple[int, str]]:
        """Make at least one token: each with the text that is complete then, as AnswerText.push has it."""
        started = time.perf_counter()
        cache = self._cache
        late = self.pending
        guess = self._guess(text) if len(late) == 1 else Guess()
        count = self._pace.choose(guess.kind, len(guess.tokens))
        tokens = list(guess.tokens[:count])
        mark = cache.mark() if tokens else None
        logits = self._forward([*late, *tokens], last=len(tokens) + 1)
        made: list[tuple[int, str]] = []
        for row, guessed in zip(logits, [*tokens, None], strict=True):
            made.append(text.push(row))
            if made[-1][0] != guessed or text.finish_reason != "unfinished":
                break
        right = len(made) - 1
        if mark is not None:
            cache.rewind(mark.length + 1 + right, mark)
        chosen = [token for token, _ in made]
        self._ids += chosen
        self._drafter.extend(chosen)
        self.guessed += len(tokens)
        self.right += right
        seconds = time.perf_counter() - started
        if len(late) > 1:
            self._pace.record_late(seconds)
        else:
            self._pace.record(guess.kind, len(tokens), right, seconds)
        if guess.tokens and not tokens:
            self._pace.record_unused(guess.kind, chosen[0] == guess.tokens[0])
        return made

    def _guess(self, text: AnswerText) -> Guess:
        """What may come next, as far as the sequence has room."""
        most = min(text.tokens_left - 1, LENGTHS[-1])
        length = len(self._ids)
        while most > 0 and not self._decoder.keeps_rotations(length, length + most):
            most //= 2
        if not self._drafter.is_free:
            most = self._pace.choose(0, most)
        return self._drafter.guess(most, text.copy_sampler) if most > 0 else Guess()
