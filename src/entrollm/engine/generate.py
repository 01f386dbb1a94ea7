"""The generation loop: tokens out of a decoder, text out of tokens."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from entrollm.engine.cache import Cache
from entrollm.engine.decoder import Decoder
from entrollm.engine.detokenize import Detokenizer, StopFinder
from entrollm.engine.options import GenerationOptions
from entrollm.engine.sampling import Sampler

FinishReason = Literal["stop", "length", "context", "unfinished"]


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
    """

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    prompt_tokens: int
    prefill_s: float
    decode_s: float

    @property
    def tokens_per_second(self) -> float:
        """Speed of generation after the prompt; 0 if fewer than two tokens were made."""
        steps = len(self.token_ids) - 1
        return steps / self.decode_s if steps > 0 and self.decode_s > 0 else 0.0


class Generation:
    """One answer in the making: iterate for the pieces of its text, then read `result`.

    Args:
        decoder: the model.
        prompt_ids: at least one and fewer than the context length, each in the vocabulary.
        options: how to sample and when to end.
        detokenizer: makes the text; None for a model without a tokenizer, whose text is empty.
        cache: the state of an earlier sequence, whose common beginning is reused; it becomes that of this one.
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
    ) -> None:
        room = decoder.config.context_length - len(prompt_ids)
        if room < 1:
            raise ValueError(
                f"the prompt has {len(prompt_ids)} tokens and leaves no room for an answer: the model's context is "
                f"{decoder.config.context_length} tokens; shorten the prompt"
            )
        if detokenizer is None and options.stop:
            raise ValueError("stop strings need a tokenizer, and this model has no tokenizer.json")
        self._decoder = decoder
        self._prompt = list(prompt_ids)
        self._options = options
        self._detokenizer = detokenizer
        self._stops = StopFinder(options.stop)
        self._cache = cache if cache is not None else decoder.new_cache()
        self._limit = min(options.max_tokens, room)
        self._limit_reason: FinishReason = "length" if options.max_tokens <= room else "context"
        self._token_ids: list[int] = []
        self._pieces: list[str] = []
        self._finish_reason: FinishReason = "unfinished"
        self._prefill_s = self._decode_s = 0.0
        self._iterator = self._run()

    def __iter__(self) -> Iterator[str]:
        """The pieces of text, none empty; together they are result.text."""
        return self._iterator

    @property
    def result(self) -> GenerationResult:
        """What has been produced so far, all of it once the iteration has ended."""
        return GenerationResult(
            text="".join(self._pieces),
            token_ids=tuple(self._token_ids),
            finish_reason=self._finish_reason,
            prompt_tokens=len(self._prompt),
            prefill_s=self._prefill_s,
            decode_s=self._decode_s,
        )

    def _run(self) -> Iterator[str]:
        sampler = Sampler(self._options.sampling, self._decoder.config.vocab_size, self._prompt)
        started = time.perf_counter()
        reused = self._cache.reuse(self._prompt)
        logits = self._forward(self._prompt[reused:])
        prefilled = time.perf_counter()
        self._prefill_s = prefilled - started
        while True:
            token = sampler(logits[0])
            self._token_ids.append(token)
            self._decode_s = time.perf_counter() - prefilled
            if token in self._options.eos_token_ids:
                self._finish_reason = "stop"
                break
            yield from self._emit(self._detokenizer.push(token) if self._detokenizer else "")
            if self._stops.stopped:
                self._finish_reason = "stop"
                return
            if len(self._token_ids) == self._limit:
                self._finish_reason = self._limit_reason
                break
            logits = self._forward([token])
        yield from self._emit(self._detokenizer.finish() if self._detokenizer else "")
        if self._stops.stopped:
            self._finish_reason = "stop"
        held = self._stops.finish()
        if held:
            self._pieces.append(held)
            yield held

    def _forward(self, ids: list[int]) -> np.ndarray[tuple[int, int], np.dtype[np.float32]]:
        return self._decoder.forward(np.array(ids, dtype=np.int64), self._cache, last_only=True)

    def _emit(self, text: str) -> Iterator[str]:
        piece = self._stops.push(text)
        if piece:
            self._pieces.append(piece)
            yield piece
