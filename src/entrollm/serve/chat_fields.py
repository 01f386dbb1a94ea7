"""The fields of requests for chat."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import Field

from entrollm.serve.errors import bad_request
from entrollm.serve.fields import GUIDES, Sampling, Strict

MAX_MESSAGES = 2048
MAX_TOOLS = 64
_MAX_DEFINITION = 64 << 10


class TextPart(Strict):
    """A part of a message."""

    type: Literal["text"]
    text: str


class CalledFunction(Strict):
    """The function of a call, with its arguments as JSON text."""

    name: str
    arguments: str


class Call(Strict):
    """A call that an earlier answer asked for."""

    id: str
    type: Literal["function"]
    function: CalledFunction
    index: int | None = None


class ChatMessage(Strict):
    """A message of a dialogue. Fields that clients copy from an answer are allowed if they are empty."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextPart] | None = None
    name: str | None = None
    refusal: None = None
    annotations: Annotated[list[Any], Field(max_length=0)] | None = None
    audio: None = None
    function_call: None = None
    tool_calls: Annotated[list[Call], Field(max_length=MAX_TOOLS)] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None

    def to_template(self) -> dict[str, object]:
        """The message as chat templates know it.

        Raises:
            ApiError: the arguments of a call are not a JSON object.
        """
        content = self.content if isinstance(self.content, str) else "\n".join(part.text for part in self.content or [])
        message: dict[str, object] = {"role": "system" if self.role == "developer" else self.role, "content": content}
        if self.name is not None:
            message["name"] = self.name
        if self.tool_call_id is not None:
            message["tool_call_id"] = self.tool_call_id
        if self.reasoning_content is not None:
            # Templates disagree on the name.
            message["reasoning_content"] = message["thinking"] = self.reasoning_content
        if self.tool_calls:
            message["tool_calls"] = [_template_call(call) for call in self.tool_calls]
        return message


class Function(Strict):
    """A function that may be called."""

    name: Annotated[str, Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Strict):
    """A tool that may be used."""

    type: Literal["function"]
    function: Function


class FunctionName(Strict):
    """The name of a function."""

    name: str


class ToolChoice(Strict):
    """The one function that must be called."""

    type: Literal["function"]
    function: FunctionName


class JsonSchema(Strict):
    """What an answer must look like."""

    name: str
    description: str | None = None
    schema_: Annotated[dict[str, Any], Field(alias="schema")]
    strict: bool | None = None


class ResponseFormat(Strict):
    """What an answer must look like: JSON, or a grammar."""

    type: Literal["text", "json_object", "json_schema", "grammar"]
    json_schema: JsonSchema | None = None
    syntax: Literal["lark", "regex"] | None = None
    definition: Annotated[str, Field(max_length=_MAX_DEFINITION)] | None = None

    @property
    def unused(self) -> str | None:
        """A field that is given and belongs to another type; `None` if there is none."""
        own = {"json_schema": {"json_schema"}, "grammar": {"syntax", "definition"}}.get(self.type, set())
        others = ("json_schema", "syntax", "definition")
        return next((name for name in others if name not in own and getattr(self, name) is not None), None)

    @property
    def schema_of_answer(self) -> dict[str, Any] | None:
        """The schema that an answer must have; `None` if it is not JSON."""
        if self.type == "json_object":
            return {"type": "object"}
        return None if self.json_schema is None else self.json_schema.schema_


class ChatRequest(Sampling):
    """The body of /v1/chat/completions."""

    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=MAX_MESSAGES)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    response_format: ResponseFormat | None = None
    tools: Annotated[list[Tool], Field(max_length=MAX_TOOLS)] | None = None
    tool_choice: Literal["none", "auto", "required"] | ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh"] | None = None

    @property
    def offered(self) -> list[Function]:
        """The functions that the answer may call."""
        return [] if self.tool_choice == "none" else [tool.function for tool in self.tools or []]

    @property
    def required(self) -> list[Function]:
        """The functions of which the answer must call one; none if it may be text."""
        if isinstance(self.tool_choice, ToolChoice):
            return [function for function in self.offered if function.name == self.tool_choice.function.name]
        return self.offered if self.tool_choice == "required" else []

    @property
    def listed_logprobs(self) -> int | None:
        """How many likeliest tokens to report with each token; `None` for no report."""
        return (self.top_logprobs or 0) if self.logprobs else None


def check_chat(request: ChatRequest) -> None:
    """Check fields of a chat request against each other.

    Raises:
        ApiError: they contradict each other.
    """
    longest = {request.max_tokens, request.max_completion_tokens} - {None}
    if len(longest) > 1:
        raise bad_request("max_tokens and max_completion_tokens differ; give one of them", "max_tokens")
    request.max_tokens = next(iter(longest), None)
    if request.top_logprobs and not request.logprobs:
        raise bad_request("top_logprobs needs logprobs: true", "top_logprobs")
    reserved = {"messages", "add_generation_prompt", "tools", "documents"} & set(request.chat_template_kwargs or {})
    if reserved:
        name = min(reserved)
        raise bad_request(f"chat_template_kwargs may not set {name}", "chat_template_kwargs")


def check_tools(request: ChatRequest) -> None:
    """Check what a chat request says of tools and of the form of its answer.

    Raises:
        ApiError: it contradicts itself.
    """
    names = [function.name for function in request.offered]
    if len(set(names)) < len(names):
        raise bad_request("two tools have the same name", "tools")
    if request.tool_choice not in (None, "none", "auto") and not request.required:
        raise bad_request("tool_choice names no function of tools", "tool_choice")
    form = request.response_format
    if form is not None and form.type == "json_schema" and form.json_schema is None:
        raise bad_request("response_format of type json_schema needs json_schema", "response_format")
    if form is not None and form.type == "grammar" and (form.syntax is None or form.definition is None):
        raise bad_request("response_format of type grammar needs syntax and definition", "response_format")
    if form is not None and (unused := form.unused):
        raise bad_request(f"response_format of type {form.type} has no {unused}; leave it out", "response_format")
    guides = [name for name in GUIDES if getattr(request, name) is not None]
    guides += ["response_format"] if form is not None and form.type != "text" else []
    if guides and request.offered:
        raise bad_request(f"{guides[0]} and tools cannot be combined; give one of them", guides[0])
    if len(guides) > 1:
        raise bad_request(f"{' and '.join(guides)} cannot be combined; give one of them", guides[0])


def _template_call(call: Call) -> dict[str, object]:
    """A call as chat templates know it: with its arguments as an object."""
    try:
        arguments = json.loads(call.function.arguments)
    except (ValueError, RecursionError):
        arguments = None
    if not isinstance(arguments, dict):
        raise bad_request(f"the arguments of the call {call.id[:80]!r} are not a JSON object", "messages")
    return {"id": call.id, "type": "function", "function": {"name": call.function.name, "arguments": arguments}}
