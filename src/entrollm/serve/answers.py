"""Answers as OpenAI's API writes them, whole and in pieces."""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from entrollm.engine.answer import FinishReason
from entrollm.engine.sampling import TokenLogprobs
from entrollm.serve.job import Job
from entrollm.serve.token_text import TokenText

Json = dict[str, object]
_LEAST_LOGPROB = -9999.0


@dataclass
class Choice:
    """One answer as far as it has come.

    Attributes:
        index: its number in the response.
        unsent: logprobs of tokens whose text was held back.
    """

    index: int
    text: list[str] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    unsent: list[TokenLogprobs] = field(default_factory=list)
    tokens: int = 0
    finish_reason: FinishReason = "unfinished"
    offset: int = 0


class Format(Protocol):
    """How one endpoint writes its choices."""

    prefix: str
    name: str
    piece_name: str

    def opening(self, choice: Choice) -> Json | None:
        """The first piece of a stream, if it has one before any text."""

    def piece(self, choice: Choice, text: str, logprobs: Sequence[TokenLogprobs]) -> Json:
        """Some text of a stream."""

    def closing(self, choice: Choice) -> Json:
        """The last piece of a stream."""

    def whole(self, choice: Choice) -> Json:
        """A finished choice."""


class Chat:
    """The format of /v1/chat/completions."""

    prefix = "chatcmpl-"
    name = "chat.completion"
    piece_name = "chat.completion.chunk"

    def __init__(self, token_text: TokenText) -> None:
        self._token_text = token_text

    def opening(self, choice: Choice) -> Json | None:
        """The role."""
        return self._piece(choice, {"role": "assistant", "content": ""}, None)

    def piece(self, choice: Choice, text: str, logprobs: Sequence[TokenLogprobs]) -> Json:
        """Some text."""
        return self._piece(choice, {"content": text}, self._logprobs(logprobs))

    def closing(self, choice: Choice) -> Json:
        """The reason for the end."""
        return self._piece(choice, {}, None) | {"finish_reason": finish_reason(choice.finish_reason)}

    def whole(self, choice: Choice) -> Json:
        """The message."""
        return {
            "index": choice.index,
            "message": {"role": "assistant", "content": "".join(choice.text), "refusal": None},
            "logprobs": self._logprobs(choice.logprobs),
            "finish_reason": finish_reason(choice.finish_reason),
        }

    def _piece(self, choice: Choice, delta: Json, logprobs: Json | None) -> Json:
        return {"index": choice.index, "delta": delta, "logprobs": logprobs, "finish_reason": None}

    def _logprobs(self, tokens: Sequence[TokenLogprobs]) -> Json | None:
        if not tokens:
            return None
        content = [
            self._token(each.token, each.logprob) | {"top_logprobs": [self._token(*pair) for pair in each.top]}
            for each in tokens
        ]
        return {"content": content, "refusal": None}

    def _token(self, token: int, logprob: float) -> Json:
        text = self._token_text(token)
        # The bytes of a part of a character are not known here.
        text_bytes = None if "\ufffd" in text else list(text.encode())
        return {"token": text, "logprob": max(logprob, _LEAST_LOGPROB), "bytes": text_bytes}


class Completion:
    """The format of /v1/completions."""

    prefix = "cmpl-"
    name = "text_completion"
    piece_name = "text_completion"

    def __init__(self, token_text: TokenText) -> None:
        self._token_text = token_text

    def opening(self, choice: Choice) -> Json | None:
        """None: a text begins with its text."""
        return None

    def piece(self, choice: Choice, text: str, logprobs: Sequence[TokenLogprobs]) -> Json:
        """Some text."""
        return {
            "index": choice.index,
            "text": text,
            "logprobs": self._logprobs(choice, logprobs),
            "finish_reason": None,
        }

    def closing(self, choice: Choice) -> Json:
        """The reason for the end."""
        return self.piece(choice, "", ()) | {"finish_reason": finish_reason(choice.finish_reason)}

    def whole(self, choice: Choice) -> Json:
        """The text."""
        piece = self.piece(choice, "".join(choice.text), choice.logprobs)
        return piece | {"finish_reason": finish_reason(choice.finish_reason)}

    def _logprobs(self, choice: Choice, tokens: Sequence[TokenLogprobs]) -> Json | None:
        if not tokens:
            return None
        texts = [self._token_text(each.token) for each in tokens]
        offsets = []
        for text in texts:
            offsets.append(choice.offset)
            choice.offset += len(text)
        return {
            "tokens": texts,
            "token_logprobs": [max(each.logprob, _LEAST_LOGPROB) for each in tokens],
            "top_logprobs": [
                {self._token_text(token): max(logprob, _LEAST_LOGPROB) for token, logprob in each.top}
                for each in tokens
            ],
            "text_offset": offsets,
        }


class Response:
    """The envelope of a response: its identity, its choices and what they cost.

    Args:
        form: how choices are written.
        model: the model's name.
        jobs: the answers, `choices` of them for each prompt, in the order of the prompts.
        choices: answers to each prompt.
    """

    def __init__(self, form: Format, model: str, jobs: Sequence[Job], choices: int) -> None:
        self._form = form
        self._jobs = jobs
        self._choices = choices
        self._head: Json = {"id": form.prefix + uuid.uuid4().hex, "created": int(time.time()), "model": model}

    def whole(self, choices: Sequence[Choice]) -> Json:
        """The response of a request without a stream."""
        body = {"choices": [self._form.whole(choice) for choice in choices], "usage": self.usage(choices)}
        return self._head | {"object": self._form.name} | body

    def piece(self, choice: Json | None, usage: Json | None = None) -> Json:
        """An event of a stream."""
        body: Json = {"object": self._form.piece_name, "choices": [] if choice is None else [choice]}
        return self._head | body | ({} if usage is None else {"usage": usage})

    def usage(self, choices: Sequence[Choice]) -> Json:
        """Counts of tokens; a prompt counts once, whatever the number of its answers."""
        first = self._jobs[:: self._choices]
        prompt_tokens = sum(len(job.prompt) for job in first)
        completion_tokens = sum(choice.tokens for choice in choices)
        return {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": completion_tokens,
            "total_tokens": prompt_tokens + completion_tokens,
            "prompt_tokens_details": {"cached_tokens": sum(job.reused_tokens for job in first)},
        }


def finish_reason(reason: FinishReason) -> str | None:
    """OpenAI's word for why an answer ended."""
    words = {"stop": "stop", "length": "length", "context": "length"}
    return words.get(reason)
