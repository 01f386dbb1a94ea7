"""How much of a prompt is read in one step, so that running streams do not stall."""

from __future__ import annotations

_WITHOUT_STREAMS = 512
_FIRST = 32
_LEAST, _MOST = 1, 512
# Reading a prompt may add this share of a step's time; the rest of the doubling that is allowed is for noise.
_EXTRA = 0.8
_NEW_SHARE = 0.25


class Pace:
    """Learns the times of steps and tells how many prompt tokens fit into the next one."""

    def __init__(self) -> None:
        self._stream_step_s: float | None = None
        self._prompt_token_s: float | None = None

    def prompt_tokens(self, streams: int) -> int:
        """Prompt tokens for a step in which `streams` sequences also generate a token."""
        if not streams:
            return _WITHOUT_STREAMS
        if self._stream_step_s is None or self._prompt_token_s is None:
            return _FIRST
        return max(_LEAST, min(_MOST, int(_EXTRA * self._stream_step_s / self._prompt_token_s)))

    def record(self, streams: int, prompt_tokens: int, elapsed_s: float) -> None:
        """Learn from a finished step."""
        if not prompt_tokens:
            self._stream_step_s = _mean(self._stream_step_s, elapsed_s)
        elif streams and self._stream_step_s is not None:
            extra_s = max(elapsed_s - self._stream_step_s, 0.02 * elapsed_s)
            self._prompt_token_s = _mean(self._prompt_token_s, extra_s / prompt_tokens)
        elif not streams and self._prompt_token_s is None:
            self._prompt_token_s = elapsed_s / prompt_tokens


def _mean(old: float | None, new: float) -> float:
    return new if old is None else (1 - _NEW_SHARE) * old + _NEW_SHARE * new
