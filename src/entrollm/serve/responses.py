"""Answers as /v1/responses writes them, whole and as events."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field

from entrollm.serve.answering import Answers, event_of
from entrollm.serve.answers import Choice, Json
from entrollm.serve.errors import ApiError
from entrollm.serve.job import Job
from entrollm.serve.output.items import Item, Reasoning, ToolCall
from entrollm.serve.responses_fields import ResponsesRequest


@dataclass
class _Open:
    """The output item that grows at the end of a response.

    Attributes:
        index: its number in the output.
        body: the item as it is now, without its text.
        text: what it holds so far.
    """

    index: int
    body: Json
    text: list[str] = field(default_factory=list)

    @property
    def is_reasoning(self) -> bool:
        return self.body["type"] == "reasoning"

    def whole(self, status: str) -> Json:
        """The item with its text."""
        return self.body | {"status": status, "content": [self.part()]}

    def part(self, *, is_empty: bool = False) -> Json:
        """Its only part."""
        text = "" if is_empty else "".join(self.text)
        if self.is_reasoning:
            return {"type": "reasoning_text", "text": text}
        return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


class ResponsesFormat:
    """Writes the one answer to a request.

    Args:
        request: what was asked; a response repeats it.
        model: the model's name.
        job: the answer.
    """

    def __init__(self, request: ResponsesRequest, model: str, job: Job) -> None:
        self._request = request
        self._job = job
        self._id = f"resp_{uuid.uuid4().hex}"
        self._model = model
        self._created_s = int(time.time())
        self._number = 0
        self._output: list[Json] = []
        self._open: _Open | None = None

    def whole(self, choices: Sequence[Choice]) -> Json:
        """The response, once its answer has ended."""
        for item in choices[0].items:
            self._add(item)
        self._close(_status(choices[0]))
        return self._response(_status(choices[0]), choices[0])

    async def events(self, answers: Answers) -> AsyncIterator[bytes]:
        """The events of a stream; the answer is given up when the iteration ends early."""
        choice = answers.choices[0]
        try:
            yield self._event("response.created", {"response": self._response("in_progress")})
            yield self._event("response.in_progress", {"response": self._response("in_progress")})
            async for _, items in answers.tokens():
                for item in items:
                    for event in self._add(item):
                        yield event
            for event in self._close(_status(choice)):
                yield event
            status = _status(choice)
            yield self._event(f"response.{status}", {"response": self._response(status, choice)})
        except ApiError as error:
            failed = self._response("failed") | {"error": {"code": error.code or error.kind, "message": error.message}}
            yield self._event("response.failed", {"response": failed})
        finally:
            answers.close()

    def _add(self, item: Item) -> list[bytes]:
        """What a part of the answer adds to a stream."""
        if isinstance(item, ToolCall):
            return [*self._close("completed"), *self._call(item)]
        text = item.text if isinstance(item, Reasoning) else item
        events: list[bytes] = []
        if self._open is None or self._open.is_reasoning != isinstance(item, Reasoning):
            events += self._close("completed")
            body: Json = {"id": f"msg_{uuid.uuid4().hex}", "type": "message", "role": "assistant"}
            if isinstance(item, Reasoning):
                body = {"id": f"rs_{uuid.uuid4().hex}", "type": "reasoning", "summary": []}
            self._open = _Open(len(self._output), body)
            added = body | {"status": "in_progress", "content": []}
            events.append(self._event("response.output_item.added", {"output_index": self._open.index, "item": added}))
            part = {**self._place(self._open), "part": self._open.part(is_empty=True)}
            events.append(self._event("response.content_part.added", part))
        self._open.text.append(text)
        delta: Json = {**self._place(self._open), "delta": text}
        name = "reasoning_text" if self._open.is_reasoning else "output_text"
        events.append(
            self._event(f"response.{name}.delta", delta if self._open.is_reasoning else delta | {"logprobs": []})
        )
        return events

    def _close(self, status: str) -> list[bytes]:
        """End the item that grows, if there is one."""
        if self._open is None:
            return []
        item, self._open = self._open, None
        self._output.append(item.whole(status))
        done: Json = {**self._place(item), "text": "".join(item.text)}
        name = "reasoning_text" if item.is_reasoning else "output_text"
        return [
            self._event(f"response.{name}.done", done if item.is_reasoning else done | {"logprobs": []}),
            self._event("response.content_part.done", {**self._place(item), "part": item.part()}),
            self._event("response.output_item.done", {"output_index": item.index, "item": item.whole(status)}),
        ]

    def _call(self, call: ToolCall) -> list[bytes]:
        item_id, index = f"fc_{uuid.uuid4().hex}", len(self._output)
        body: Json = {"id": item_id, "type": "function_call", "call_id": call.call_id, "name": call.name}
        whole = body | {"arguments": call.arguments, "status": "completed"}
        self._output.append(whole)
        place: Json = {"item_id": item_id, "output_index": index}
        added = {"output_index": index, "item": body | {"arguments": "", "status": "in_progress"}}
        done = place | {"name": call.name, "arguments": call.arguments}
        return [
            self._event("response.output_item.added", added),
            self._event("response.function_call_arguments.delta", place | {"delta": call.arguments}),
            self._event("response.function_call_arguments.done", done),
            self._event("response.output_item.done", {"output_index": index, "item": whole}),
        ]

    def _place(self, item: _Open) -> Json:
        return {"item_id": item.body["id"], "output_index": item.index, "content_index": 0}

    def _event(self, name: str, body: Json) -> bytes:
        self._number += 1
        return event_of({"type": name, "sequence_number": self._number - 1, **body}, name)

    def _response(self, status: str, choice: Choice | None = None) -> Json:
        asked = self._request.model_dump(by_alias=True, exclude_none=True)
        incomplete = {"reason": "max_output_tokens"} if status == "incomplete" else None
        return {
            "id": self._id,
            "object": "response",
            "created_at": self._created_s,
            "status": status,
            "error": None,
            "incomplete_details": incomplete,
            "model": self._model,
            "output": list(self._output),
            "instructions": self._request.instructions,
            "max_output_tokens": self._request.max_output_tokens,
            "metadata": {},
            "parallel_tool_calls": self._request.parallel_tool_calls is not False,
            "previous_response_id": None,
            "reasoning": asked.get("reasoning", {"effort": None, "summary": None}),
            "store": False,
            "temperature": self._request.temperature,
            "text": asked.get("text", {"format": {"type": "text"}}),
            "tool_choice": asked.get("tool_choice", "auto"),
            "tools": asked.get("tools", []),
            "top_p": self._request.top_p,
            "truncation": "disabled",
            "usage": None if choice is None else self._usage(choice),
        }

    def _usage(self, choice: Choice) -> Json:
        return {
            "input_tokens": len(self._job.prompt),
            "input_tokens_details": {"cached_tokens": self._job.reused_tokens},
            "output_tokens": choice.tokens,
            "output_tokens_details": {"reasoning_tokens": choice.reasoning_tokens},
            "total_tokens": len(self._job.prompt) + choice.tokens,
        }


def _status(choice: Choice) -> str:
    return "completed" if choice.finish_reason == "stop" else "incomplete"
