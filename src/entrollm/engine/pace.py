"""How many tokens to guess at a time: what the clock and the guesses so far say."""

from __future__ import annotations

# Lengths of guesses, which make batches of 2, 4, 8 and 16 tokens: products are made for these.
LENGTHS = (1, 3, 7, 15)
# Until a batch has been timed, each token beyond the first is taken to cost this share of a single one.
_ASSUMED_COST = 0.35
# How much of the time may be lost by guesses, and how many single tokens' time at the start.
_LOSS, _FIRST_LOSS = 0.03, 1.0
# How much of what was won may be lost again, in single tokens' time.
_MOST_CREDIT = 8.0
# Guesses in a row after which a single token is timed again.
_TIMED_AFTER = 32
# The share of the newest measurement in an average.
_NEWEST_TIME, _NEWEST_RATE = 0.25, 0.1
# How often guesses of a kind are taken to be right until that is known.
_FIRST_RATES = (0.5, 0.5, 0.5, 0.75, 0.9)
# The share of an unused measurement that is forgotten with each token that is made without a guess.
_FORGOTTEN = 0.02


class Pace:
    """Chooses the length of guesses so that text comes fastest, and never much slower than without.

    Guesses of each kind are right at a rate that is estimated, and batches of each size take a time that is measured.
    Where guesses do not pay there are none; the time that they may lose in all is a small share of the time so far.

    Args:
        is_free: whether a guess takes no time, so that unused ones can tell how good they are.
    """

    def __init__(self, is_free: bool) -> None:
        self._is_free = is_free
        self._rates: dict[int, float] = {}
        self._seconds: dict[int, float] = {}
        self._elapsed = 0.0
        self._lost = 0.0
        self._in_a_row = 0

    def choose(self, kind: int, most: int) -> int:
        """How many tokens to guess: 0 or one of LENGTHS.

        Args:
            kind: of the guess.
            most: tokens that there is room for.
        """
        single = self._seconds.get(0)
        if single is None or self._in_a_row >= _TIMED_AFTER:
            return 0
        rate = self._rate(kind)
        lengths = [length for length in LENGTHS if length <= most]
        best = max(lengths, key=lambda length: self._gain(rate, length, single), default=0)
        if not lengths or self._gain(rate, best, single) <= 1.0:
            if self._is_free or not lengths:
                return 0
            best = lengths[0]  # a try now and then tells whether guesses are still wrong
            if self._lost > 0:
                return 0
        risk = self._time(best, single) - single
        return best if self._lost + risk <= _LOSS * self._elapsed + _FIRST_LOSS * single else 0

    def record(self, kind: int, guessed: int, right: int, seconds: float) -> None:
        """Learn from a pass of the model.

        Args:
            kind: of the guess.
            guessed: how many tokens were guessed, 0 or one of LENGTHS.
            right: how many of them the model chose too.
            seconds: that the pass and the guess took.
        """
        self._elapsed += seconds
        single = self._seconds.get(0)
        if guessed:
            self._learn(kind, [True] * right + [False] * (right < guessed))
            if single is not None:
                self._lost = max(self._lost + seconds - (right + 1) * single, -_MOST_CREDIT * single)
        self._in_a_row = self._in_a_row + 1 if guessed else 0
        known = self._seconds.get(guessed)
        self._seconds[guessed] = seconds if known is None else known + _NEWEST_TIME * (seconds - known)
        if not guessed:
            self._forget()

    def record_late(self, seconds: float) -> None:
        """Count a pass that made one token and ran others again, since a state could not go back to them."""
        self._elapsed += seconds
        self._lost += seconds - self._seconds.get(0, seconds)

    def record_unused(self, kind: int, is_right: bool) -> None:
        """Learn whether the first token of a guess was right that was not run."""
        self._learn(kind, [is_right])

    def _learn(self, kind: int, results: list[bool]) -> None:
        for is_right in results:
            rate = self._rate(kind)
            self._rates[kind] = rate + _NEWEST_RATE * (is_right - rate)

    def _rate(self, kind: int) -> float:
        return self._rates.get(kind, _FIRST_RATES[min(kind, len(_FIRST_RATES) - 1)])

    def _forget(self) -> None:
        """Move the times of guesses towards what is assumed, since one that was disturbed would else never be tried."""
        single = self._seconds[0]
        for length, seconds in self._seconds.items():
            assumed = single * (1 + _ASSUMED_COST * length)
            if seconds > assumed:
                self._seconds[length] = seconds + _FORGOTTEN * (assumed - seconds)

    def _time(self, length: int, single: float) -> float:
        """The seconds that a pass with a guess takes."""
        known = self._seconds.get(length)
        if known is not None:
            return known
        shorter = max((each for each in self._seconds if each < length), default=0)
        return self._seconds.get(shorter, single) + _ASSUMED_COST * single * (length - shorter)

    def _gain(self, rate: float, length: int, single: float) -> float:
        """Tokens that a pass makes in the time of a single one."""
        tokens = sum(rate**place for place in range(length + 1))
        return tokens * single / self._time(length, single)
