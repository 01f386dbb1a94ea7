"""The prompt as a part of the answer, with its log-probabilities."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import nan

from entrollm.engine.sampling import TokenLogprobs, check_finite, token_logprobs
from entrollm.engine.text_model import TextModel
from entrollm.engine.weights import Floats

# Logits of so many tokens are computed at a time; a row of them may take half a megabyte.
_ROWS = 32


@dataclass
class Echo:
    """A prompt that its answer begins with.

    Attributes:
        text: of the prompt.
        logprobs: of its tokens; the first one has none, which is NaN here. Empty if they were not asked for.
    """

    text: str
    logprobs: list[TokenLogprobs] = field(default_factory=list)


class PromptLogprobs:
    """Computes the log-probabilities of a prompt's tokens while it is read; see `observe` of SequenceStep.

    Args:
        model: reads the prompt.
        ids: its tokens.
        count: how many likeliest tokens to list with each.
        echo: is filled.
    """

    def __init__(self, model: TextModel, ids: Sequence[int], count: int, echo: Echo) -> None:
        self._model = model
        self._ids = ids
        self._count = count
        self._echo = echo

    def __call__(self, start: int, hidden: Floats) -> None:
        """Take the hidden states of the tokens from `start` on.

        Raises:
            FormatError: a likeliest logit is not finite.
        """
        if start == 0:
            self._echo.logprobs = [TokenLogprobs(self._ids[0], nan, ())]
        following = self._ids[start + 1 : start + 1 + len(hidden)]
        for first in range(0, len(following), _ROWS):
            tokens = following[first : first + _ROWS]
            logits = self._model.logits_of(hidden[first : first + len(tokens)])
            check_finite(logits.max(axis=1), "logits")
            self._echo.logprobs += [
                token_logprobs(row, token, self._count) for row, token in zip(logits, tokens, strict=True)
            ]
