"""The generation loop: tokens out of a decoder, text out of tokens."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np

from entrollm.engine.answer import AnswerText, FinishReason
from entrollm.engine.cache import Cache
from entrollm.engine.decoder import Decoder
from entrollm.engine.detokenize import Detokenizer
from entrollm.engine.options import GenerationOptions
from entrollm.engine.speculate import Drafter, Speculation


@dataclass(frozen=True)
class GenerationResult:
    """What a generation produced.

    Attributes:
        text: the new text, without special tokens and without the stop string that ended it.
        token_ids: every new token, the end token included.
        finish_reason: "stop" for an end token or stop string, "length" for max_tokens, "context" when prompt and
            answer fill the model's context, "unfinished" while the generation runs or after it was abandoned.
        prompt_tokens: tokens in the prompt, reused ones included.
        prefill_s: seconds until the prompt was processed.
        decode_s: seconds for all tokens after the first.
        guessed_tokens: how many tokens were guessed and run before it was known that they are chosen.
        right_tokens: how many of them were chosen.
    """

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    prompt_tokens: int
    prefill_s: float
    decode_s: float
    guessed_tokens: int = 0
    right_tokens: int = 0

    @property
    def tokens_per_second(self) -> float:
        """Speed of generation after the prompt; 0 if fewer than two tokens were made."""
        steps = len(self.token_ids) - 1
        return steps / self.decode_s if steps > 0 and self.decode_s > 0 else 0.0


@dataclass
class _Answer:
    """What a generation has produced so far; see GenerationResult."""

    token_ids: list[int] = field(default_factory=list)
    pieces: list[str] = field(default_factory=list)
    finish_reason: FinishReason = "unfinished"
    prefill_s: float = 0.0
    decode_s: float = 0.0
    guessed_tokens: int = 0
    right_tokens: int = 0


class Generation:
    """One answer in the making: iterate for the pieces of its text, then read `result`.

    A generation that is dropped half way frees its cache at once, unless the caller holds the cache.

    Args:
        decoder: the model.
        prompt_ids: at least one and fewer than the context length, each in the vocabulary.
        options: how to sample and when to end.
        detokenizer: makes the text; None for a model without a tokenizer, whose text is empty.
        cache: the state of an earlier sequence, whose common beginning is reused; it becomes that of this one. The
            iteration raises ValueError if another generation has used it in the meantime.
        drafter: guesses tokens of the answer; None for no guesses, which give the same tokens.
    Raises:
        ValueError: the prompt leaves no room in the context, or a stop string is given without a tokenizer.
    """

    def __init__(
        self,
        decoder: Decoder,
        prompt_ids: Sequence[int],
        options: GenerationOptions,
        detokenizer: Detokenizer | None,
        cache: Cache | None = None,
        drafter: Drafter | None = None,
    ) -> None:
        room = decoder.config.context_length - len(prompt_ids)
        if room < 1:
            raise ValueError(
                f"the prompt has {len(prompt_ids)} tokens and leaves no room for an answer: the model's context is "
                f"{decoder.config.context_length} tokens; shorten the prompt"
            )
        if detokenizer is None and options.stop:
            raise ValueError("stop strings need a tokenizer, and this model has no tokenizer.json")
        self._prompt_tokens = len(prompt_ids)
        self._answer = _Answer()
        # The run holds the answer and not this object: a cycle would keep the cache until the cyclic collector runs.
        cache = decoder.new_cache() if cache is None else cache
        run = _Run(decoder, list(prompt_ids), options, detokenizer, cache, room, self._answer, drafter)
        self._iterator = run.pieces()

    def __iter__(self) -> Iterator[str]:
        """The pieces of text, none empty; together they are result.text."""
        return self._iterator

    @property
    def result(self) -> GenerationResult:
        """What has been produced so far, all of it once the iteration has ended."""
        return GenerationResult(
            text="".join(self._answer.pieces),
            token_ids=tuple(self._answer.token_ids),
            finish_reason=self._answer.finish_reason,
            prompt_tokens=self._prompt_tokens,
            prefill_s=self._answer.prefill_s,
            decode_s=self._answer.decode_s,
            guessed_tokens=self._answer.guessed_tokens,
            right_tokens=self._answer.right_tokens,
        )


@dataclass
class _Run:
    """The loop that fills an answer; `room` is how many tokens the context has left after the prompt."""

    decoder: Decoder
    prompt: list[int]
    options: GenerationOptions
    detokenizer: Detokenizer | None
    cache: Cache
    room: int
    answer: _Answer
    drafter: Drafter | None

    def pieces(self) -> Iterator[str]:
        """The pieces of text; nothing is computed before the first is asked for."""
        answer, decoder = self.answer, self.decoder
        text = AnswerText(self.options, decoder.config.vocab_size, self.prompt, self.room, self.detokenizer)
        started = time.perf_counter()
        claim = self.cache.claim()
        reused = self.cache.reuse(self.prompt)
        made = [text.push(self._forward(self.prompt[reused:], claim)[0])]
        speculation: Speculation | None = None
        if self.drafter is not None:
            forward = partial(self._forward, claim=claim)
            speculation = Speculation(self.drafter, [*self.prompt, made[0][0]], decoder, self.cache, forward)
        prefilled = time.perf_counter()
        answer.prefill_s = prefilled - started
        while True:
            for place, (token, piece) in enumerate(made, 1):
                answer.token_ids.append(token)
                answer.decode_s = time.perf_counter() - prefilled
                if place == len(made):
                    answer.finish_reason = text.finish_reason
                if piece:
                    answer.pieces.append(piece)
                    yield piece
            if text.finish_reason != "unfinished":
                return
            if speculation is None:
                made = [text.push(self._forward([made[0][0]], claim)[0])]
            else:
                made = speculation.step(text)
                answer.guessed_tokens, answer.right_tokens = speculation.guessed, speculation.right

    def _forward(
        self, ids: Sequence[int], claim: object, last: int = 1
    ) -> np.ndarray[tuple[int, int], np.dtype[np.float32]]:
        if not self.cache.is_claimed_by(claim):
            raise ValueError(
                "another stream has used this stream's cache in the meantime; give each of the streams that run side "
                "by side a cache of its own, from new_cache()"
            )
        observe = None if self.drafter is None else self.drafter.observe
        return self.decoder.forward(np.array(ids, dtype=np.int64), self.cache, last=last, observe=observe)
