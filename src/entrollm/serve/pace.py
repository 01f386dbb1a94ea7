"""How much of a prompt is read in one step, so that running streams do not stall."""

from __future__ import annotations

import statistics
from collections import deque

_WITHOUT_STREAMS = 512
_FIRST = 32
_LEAST, _MOST = 1, 512
# Reading a prompt may add this share of a step's time; the rest of the doubling that is allowed is for noise.
_EXTRA = 0.8
_NEW_SHARE = 0.25
# Steps without a prompt whose median counts: the last ones before a long prompt are slower, since its tokens are being
# found meanwhile, and no others follow until it has been read.
_STEPS = 9


class Pace:
    """Learns the times of steps and tells how many prompt tokens fit into the next one.

    Args:
        least: tokens of a piece at least, for a model that takes as long for fewer. Pieces then come after as many
            steps of streams as make up for them, so that streams keep their share of the time.
    """

    def __init__(self, least: int = _LEAST) -> None:
        self._least = least
        # What pieces have taken beyond their share.
        self._debt_s = 0.0
        self._stream_steps_s: deque[float] = deque(maxlen=_STEPS)
        self._prompt_token_s: float | None = None

    def prompt_tokens(self, streams: int) -> int:
        """Prompt tokens for a step in which `streams` sequences also generate a token."""
        if not streams:
            return _WITHOUT_STREAMS
        if self._debt_s > 0:
            return 0
        if not self._stream_steps_s or self._prompt_token_s is None:
            return max(_FIRST, self._least)
        step_s = statistics.median(self._stream_steps_s)
        return max(self._least, min(_MOST, int(_EXTRA * step_s / self._prompt_token_s)))

    def record(self, streams: int, prompt_tokens: int, elapsed_s: float) -> None:
        """Learn from a finished step."""
        if not prompt_tokens:
            self._stream_steps_s.append(elapsed_s)
            self._debt_s = max(0.0, self._debt_s - _EXTRA * elapsed_s)
        elif streams and self._stream_steps_s:
            step_s = statistics.median(self._stream_steps_s)
            extra_s = max(elapsed_s - step_s, 0.02 * elapsed_s)
            self._prompt_token_s = _mean(self._prompt_token_s, extra_s / prompt_tokens)
            if self._least > _LEAST:
                self._debt_s = max(0.0, extra_s - _EXTRA * step_s)
        elif not streams and self._prompt_token_s is None:
            self._prompt_token_s = elapsed_s / prompt_tokens


def _mean(old: float | None, new: float) -> float:
    return new if old is None else (1 - _NEW_SHARE) * old + _NEW_SHARE * new
