"""Answers as OpenAI's API writes them, whole and in pieces."""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from math import isnan
from typing import Any, Protocol

from entrollm.engine.answer import FinishReason
from entrollm.engine.sampling import TokenLogprobs
from entrollm.serve.echo import Echo
from entrollm.serve.job import Job
from entrollm.serve.output.items import Item, Parser, Reasoning, ToolCall
from entrollm.serve.token_text import TokenText

Json = dict[str, object]
_LEAST_LOGPROB = -9999.0


@dataclass
class Choice:
    """One answer as far as it has come.

    Attributes:
        index: its number in the response.
        items: what it consists of.
        unsent: logprobs of tokens whose text was held back.
        parser: finds reasoning and calls in the text; `None` if it is text alone.
        most_calls: the answer ends after so many calls; `None` for any number.
        calls, sent_calls: how many it has, and how many of them are in the stream.
        reasoning_tokens: tokens of its reasoning.
        echo: the prompt, until it is in the response; `None` to leave it out.
    """

    index: int
    items: list[Item] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    unsent: list[TokenLogprobs] = field(default_factory=list)
    tokens: int = 0
    finish_reason: FinishReason = "unfinished"
    offset: int = 0
    parser: Parser | None = None
    most_calls: int | None = None
    calls: int = 0
    sent_calls: int = 0
    reasoning_tokens: int = 0
    echo: Echo | None = None

    def read(self, text: str) -> list[Item]:
        """What a token's text completes; finish_reason is that of the token.

        The call after which the answer ends sets finish_reason.
        """
        found: list[Item] = [text] if text else []
        if self.parser is not None:
            found = self.parser.push(text)
            if self.finish_reason != "unfinished":
                found += self.parser.finish()
        kept = []
        for item in found:
            kept.append(item)
            self.calls += isinstance(item, ToolCall)
            if self.calls == self.most_calls:
                self.finish_reason = "stop"
                break
        self.reasoning_tokens += any(isinstance(item, Reasoning) for item in kept)
        return kept

    @property
    def text(self) -> str:
        """The text, without reasoning and calls."""
        return "".join(item for item in self.items if isinstance(item, str))


class Format(Protocol):
    """How one endpoint writes its choices."""

    prefix: str
    name: str
    piece_name: str

    def opening(self, choice: Choice) -> Json | None:
        """The first piece of a stream, if it has one before any text."""

    def pieces(self, choice: Choice, items: Sequence[Item]) -> list[Json]:
        """What a token adds to a stream."""

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

    def pieces(self, choice: Choice, items: Sequence[Item]) -> list[Json]:
        """Text, reasoning, or calls that are complete: each in two pieces, its name and its arguments."""
        deltas = [delta for item in items for delta in self._deltas(choice, item)]
        if not deltas and choice.unsent:
            deltas = [{"content": ""}]
        pieces = []
        for delta in deltas:
            pieces.append(self._piece(choice, delta, self._logprobs(choice.unsent)))
            choice.unsent.clear()
        return pieces

    def closing(self, choice: Choice) -> Json:
        """The reason for the end."""
        return self._piece(choice, {}, None) | {"finish_reason": self._reason(choice)}

    def whole(self, choice: Choice) -> Json:
        """The message."""
        calls = [item for item in choice.items if isinstance(item, ToolCall)]
        reasoning = "".join(item.text for item in choice.items if isinstance(item, Reasoning))
        text = choice.text
        message: Json = {"role": "assistant", "content": None if calls and not text else text, "refusal": None}
        if reasoning:
            message["reasoning_content"] = reasoning
        if calls:
            message["tool_calls"] = [self._call(call, call.arguments) for call in calls]
        return {
            "index": choice.index,
            "message": message,
            "logprobs": self._logprobs(choice.logprobs),
            "finish_reason": self._reason(choice),
        }

    def _deltas(self, choice: Choice, item: Item) -> list[dict[str, Any]]:
        if isinstance(item, str):
            return [{"content": item}]
        if isinstance(item, Reasoning):
            return [{"reasoning_content": item.text}]
        index = choice.sent_calls
        choice.sent_calls += 1
        begin = {"index": index, **self._call(item, "")}
        return [
            {"tool_calls": [begin]},
            {"tool_calls": [{"index": index, "function": {"arguments": item.arguments}}]},
        ]

    def _call(self, call: ToolCall, arguments: str) -> Json:
        return {"id": call.call_id, "type": "function", "function": {"name": call.name, "arguments": arguments}}

    def _reason(self, choice: Choice) -> str | None:
        reason = finish_reason(choice.finish_reason)
        return "tool_calls" if choice.calls and reason == "stop" else reason

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

    def pieces(self, choice: Choice, items: Sequence[Item]) -> list[Json]:
        """Some text."""
        text = "".join(item for item in items if isinstance(item, str))
        if not (text or choice.unsent or choice.echo):
            return []
        piece = self._piece(choice, text, choice.unsent)
        choice.unsent.clear()
        return [piece]

    def closing(self, choice: Choice) -> Json:
        """The reason for the end."""
        return self._piece(choice, "", ()) | {"finish_reason": finish_reason(choice.finish_reason)}

    def whole(self, choice: Choice) -> Json:
        """The text."""
        piece = self._piece(choice, choice.text, choice.logprobs)
        return piece | {"finish_reason": finish_reason(choice.finish_reason)}

    def _piece(self, choice: Choice, text: str, logprobs: Sequence[TokenLogprobs]) -> Json:
        echo, choice.echo = choice.echo, None
        if echo is not None:
            text, logprobs = echo.text + text, [*echo.logprobs, *logprobs]
        logged = self._logprobs(choice, logprobs)
        return {"index": choice.index, "text": text, "logprobs": logged, "finish_reason": None}

    def _logprobs(self, choice: Choice, tokens: Sequence[TokenLogprobs]) -> Json | None:
        if not tokens:
            return None
        texts = [self._token_text(each.token) for each in tokens]
        offsets = []
        for each, text in zip(tokens, texts, strict=True):
            offsets.append(choice.offset)
            choice.offset += 0 if self._token_text.is_special(each.token) else len(text)
        return {
            "tokens": texts,
            "token_logprobs": [None if isnan(each.logprob) else max(each.logprob, _LEAST_LOGPROB) for each in tokens],
            "top_logprobs": [
                None
                if isnan(each.logprob)
                else {self._token_text(token): max(logprob, _LEAST_LOGPROB) for token, logprob in each.top}
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
        reasoning_tokens = sum(choice.reasoning_tokens for choice in choices)
        return {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": completion_tokens,
            "total_tokens": prompt_tokens + completion_tokens,
            "prompt_tokens_details": {"cached_tokens": sum(job.reused_tokens for job in first)},
            "completion_tokens_details": {"reasoning_tokens": reasoning_tokens},
        }


def finish_reason(reason: FinishReason) -> str | None:
    """OpenAI's word for why an answer ended."""
    words = {"stop": "stop", "length": "length", "context": "length"}
    return words.get(reason)
