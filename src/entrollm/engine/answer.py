"""One answer in the making: logits in, tokens and text out, until it ends."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from entrollm.engine.detokenize import Detokenizer, StopFinder
from entrollm.engine.options import GenerationOptions
from entrollm.engine.sampling import Sampler
from entrollm.engine.weights import Floats

FinishReason = Literal["stop", "length", "context", "unfinished"]


class Constraint(Protocol):
    """What an answer must look like, such as a grammar."""

    @property
    def is_complete(self) -> bool:
        """Whether nothing can follow the tokens so far."""

    def allowed(self) -> NDArray[np.bool_]:
        """Which tokens may come next, end tokens included: bool (vocab_size,), at least one of them true."""

    def accept(self, token: int) -> None:
        """Go on after a token that was allowed."""


class AnswerText:
    """Chooses the tokens of one answer and makes its text.

    Attributes:
        finish_reason: "unfinished" until the answer has ended; see GenerationResult.
        tokens: how many there are so far.

    Args:
        options: how to sample and when to end.
        vocab_size: logits per token.
        prompt_ids: the tokens before.
        room: tokens that the context has left after the prompt, at least 1.
        detokenizer: makes the text; None for a model without a tokenizer, whose text is empty.
    """

    def __init__(
        self,
        options: GenerationOptions,
        vocab_size: int,
        prompt_ids: Sequence[int],
        room: int,
        detokenizer: Detokenizer | None,
    ) -> None:
        self.finish_reason: FinishReason = "unfinished"
        self.tokens = 0
        self._options = options
        self._room = room
        self._detokenizer = detokenizer
        self._sampler = Sampler(options.sampling, vocab_size, prompt_ids)
        self._stops = StopFinder(options.stop)
        self._constraint: Constraint | None = None

    def constrain(self, constraint: Constraint) -> None:
        """Let only answers that satisfy `constraint` be made; call it before the first token."""
        self._constraint = constraint

    @property
    def tokens_left(self) -> int:
        """How many more tokens the answer can have."""
        return min(self._options.max_tokens, self._room) - self.tokens

    def copy_sampler(self) -> Sampler:
        """A sampler that chooses what push will, as long as it is given the same logits and nothing constrains them."""
        return self._sampler.copy()

    def push(self, logits: Floats) -> tuple[int, str]:
        """Choose the next token.

        Args:
            logits: float32 (vocab_size,).
        Returns:
            (token, text): the text that is complete now, often "". The token that ends the answer brings the text that
            was held back for a stop string or an unfinished character.
        Raises:
            FormatError, ValueError: as Sampler.
        """
        options = self._options
        constraint = self._constraint
        if constraint is not None:
            token = self._sampler(logits, allowed=constraint.allowed())
            constraint.accept(token)
        else:
            must_go_on = self.tokens < options.min_tokens
            token = self._sampler(logits, banned=options.eos_token_ids if must_go_on else ())
        self.tokens += 1
        text = ""
        if token in options.eos_token_ids:
            self.finish_reason = "stop"
        else:
            text = self._stops.push(self._detokenizer.push(token) if self._detokenizer else "")
            if self._stops.stopped or (constraint is not None and constraint.is_complete):
                self.finish_reason = "stop"
            elif self.tokens == min(options.max_tokens, self._room):
                self.finish_reason = "length" if options.max_tokens <= self._room else "context"
        if self.finish_reason != "unfinished" and not self._stops.stopped:
            text += self._stops.push(self._detokenizer.finish() if self._detokenizer else "")
            if self._stops.stopped:
                self.finish_reason = "stop"
            text += self._stops.finish()
        return token, text
