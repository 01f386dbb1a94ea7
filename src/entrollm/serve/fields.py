"""The fields of requests: which are followed, which change nothing, and which are refused by name."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Annotated, Any, Literal, NoReturn, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, WithJsonSchema

from entrollm.engine.options import GenerateKeywords
from entrollm.serve.errors import ApiError, bad_request
from entrollm.serve.tool_calls import CLOSE

MAX_CHOICES = 16
_MAX_STOPS = 16
_MAX_BIASES = 1024
_MAX_MESSAGES = 2048
_MAX_PROMPTS = 64
_MAX_TOOLS = 64

# Fields of OpenAI's that say who asks or how to bill and store, and nothing about the answer.
_INERT = frozenset(
    {"user", "metadata", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention"}
)
# Fields that would change the answer and are not implemented, with the values at which they do nothing.
_UNSUPPORTED: Mapping[str, tuple[object, ...]] = {
    "audio": (),
    "best_of": (1,),
    "echo": (False,),
    "function_call": (),
    "functions": ([],),
    "modalities": (["text"],),
    "moderation": (),
    "parallel_tool_calls": (True, False),
    "prediction": (),
    "reasoning_effort": (),
    "response_format": ({"type": "text"},),
    "store": (False,),
    "suffix": ("",),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "verbosity": (),
    "web_search_options": (),
}

Stop = Annotated[str, Field(min_length=1, max_length=1024)]
TokenId = Annotated[int, Field(ge=0, lt=2**31)]
Request = TypeVar("Request", bound=BaseModel)


def _listed(value: object) -> object:
    return [value] if isinstance(value, str) else value


def _prompts(value: object) -> object:
    """The prompts of a request as a list, each of them text or token ids."""
    prompts = value if isinstance(value, list) else [value]
    if isinstance(value, list) and value and all(type(token) is int for token in value):
        prompts = [value]
    if not 1 <= len(prompts) <= _MAX_PROMPTS:
        raise ValueError(f"should hold 1 to {_MAX_PROMPTS} prompts")
    for prompt in prompts:
        is_ids = isinstance(prompt, list) and prompt and all(type(token) is int and token >= 0 for token in prompt)
        if not (isinstance(prompt, str) or is_ids):
            raise ValueError("should be a text, token ids, or a list of either")
    return prompts


_TOKEN_IDS = {"type": "array", "items": {"type": "integer", "minimum": 0}}
_ONE_PROMPT = [{"type": "string"}, _TOKEN_IDS]
Prompts = Annotated[
    list[Any],
    BeforeValidator(_prompts),
    WithJsonSchema({"anyOf": [*_ONE_PROMPT, {"type": "array", "items": {"anyOf": _ONE_PROMPT}}]}),
]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class StreamOptions(_Strict):
    """Options of a stream."""

    include_usage: bool | None = None
    include_obfuscation: Literal[False] | None = None


class Sampling(_Strict):
    """What chat and text completions have in common; `None` takes the model's default."""

    model: str | None = None
    temperature: Annotated[float, Field(ge=0, le=100)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=0, lt=2**31)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(ge=0.01, le=100)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    logit_bias: Annotated[dict[str, Annotated[float, Field(ge=-100, le=100)]], Field(max_length=_MAX_BIASES)] | None = (
        None
    )
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: Annotated[list[Stop], Field(max_length=_MAX_STOPS), BeforeValidator(_listed)] | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    @property
    def choices(self) -> int:
        """Answers to each prompt."""
        return self.n or 1

    @property
    def includes_usage(self) -> bool:
        """Whether a stream ends with the counts of tokens."""
        return bool(self.stream_options and self.stream_options.include_usage)

    def keywords(self, choice: int, max_tokens: int) -> GenerateKeywords:
        """The engine's options for one of the choices.

        Args:
            choice: its number; with a seed, each choice has another one.
            max_tokens: where the request has none.
        """
        return {
            "temperature": self.temperature,
            "top_p": self.top_p,
            "top_k": self.top_k,
            "min_p": self.min_p,
            "repetition_penalty": self.repetition_penalty,
            "presence_penalty": self.presence_penalty,
            "frequency_penalty": self.frequency_penalty,
            "logit_bias": _token_biases(self.logit_bias or {}),
            "seed": None if self.seed is None else (self.seed + choice) % 2**63,
            "stop": self.stop,
            "max_tokens": self.max_tokens or max_tokens,
        }


class TextPart(_Strict):
    """A part of a message."""

    type: Literal["text"]
    text: str


class CalledFunction(_Strict):
    """The function of a call, with its arguments as JSON text."""

    name: str
    arguments: str


class Call(_Strict):
    """A call that an earlier answer asked for."""

    id: str
    type: Literal["function"]
    function: CalledFunction
    index: int | None = None


class ChatMessage(_Strict):
    """A message of a dialogue. Fields that clients copy from an answer are allowed if they are empty."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextPart] | None = None
    name: str | None = None
    refusal: None = None
    annotations: Annotated[list[Any], Field(max_length=0)] | None = None
    audio: None = None
    function_call: None = None
    tool_calls: Annotated[list[Call], Field(max_length=_MAX_TOOLS)] | None = None
    tool_call_id: str | None = None

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
        if self.tool_calls:
            message["tool_calls"] = [_template_call(call) for call in self.tool_calls]
        return message


class Function(_Strict):
    """A function that may be called."""

    name: Annotated[str, Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(_Strict):
    """A tool that may be used."""

    type: Literal["function"]
    function: Function


class FunctionName(_Strict):
    """The name of a function."""

    name: str


class ToolChoice(_Strict):
    """The one function that must be called."""

    type: Literal["function"]
    function: FunctionName


class JsonSchema(_Strict):
    """What an answer must look like."""

    name: str
    description: str | None = None
    schema_: Annotated[dict[str, Any], Field(alias="schema")]
    strict: bool | None = None


class ResponseFormat(_Strict):
    """Whether an answer must be JSON."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @property
    def schema_of_answer(self) -> dict[str, Any] | None:
        """The schema that an answer must have; `None` for plain text."""
        if self.type == "json_object":
            return {"type": "object"}
        return None if self.json_schema is None else self.json_schema.schema_


class ChatRequest(Sampling):
    """The body of /v1/chat/completions."""

    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=_MAX_MESSAGES)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    response_format: ResponseFormat | None = None
    tools: Annotated[list[Tool], Field(max_length=_MAX_TOOLS)] | None = None
    tool_choice: Literal["none", "auto", "required"] | ToolChoice | None = None
    parallel_tool_calls: bool | None = None

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


class CompletionRequest(Sampling):
    """The body of /v1/completions."""

    prompt: Prompts
    logprobs: Annotated[int, Field(ge=0, le=5)] | None = None


class TokenizeRequest(_Strict):
    """The body of /tokenize."""

    model: str | None = None
    prompt: str
    add_special_tokens: bool = True


class DetokenizeRequest(_Strict):
    """The body of /detokenize."""

    model: str | None = None
    tokens: list[TokenId]


def parse(kind: type[Request], body: bytes) -> Request:
    """Read a request's body.

    Raises:
        ApiError: it is not valid JSON, a field is unknown or unsupported, or a value is wrong; the error names it.
    """
    try:
        values = json.loads(body, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise bad_request(f"the body is not valid JSON: {error}"[:300]) from None
    if not isinstance(values, dict):
        raise bad_request(f"the body should be a JSON object, found {type(values).__name__}")
    fields = {}
    for name, value in values.items():
        if name in kind.model_fields:
            fields[name] = value
        elif name in _UNSUPPORTED:
            if value is not None and value not in _UNSUPPORTED[name]:
                raise bad_request(f"{name} is not supported here; leave it out", name, "unsupported_parameter")
        elif name not in _INERT:
            raise bad_request(f"unknown field {name[:80]!r}; leave it out", name[:80], "unknown_parameter")
    try:
        return kind.model_validate(fields)
    except ValidationError as error:
        raise _explain(error) from None


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

    Where it wants one call at most, the end of a call becomes a stop string.

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
    if form is not None and form.schema_of_answer is not None and request.offered:
        raise bad_request("response_format and tools cannot be combined; give one of them", "response_format")
    if request.offered and request.parallel_tool_calls is False:
        request.stop = [*(request.stop or []), CLOSE]


def _template_call(call: Call) -> dict[str, object]:
    """A call as chat templates know it: with its arguments as an object."""
    try:
        arguments = json.loads(call.function.arguments)
    except (ValueError, RecursionError):
        arguments = None
    if not isinstance(arguments, dict):
        raise bad_request(f"the arguments of the call {call.id[:80]!r} are not a JSON object", "messages")
    return {"id": call.id, "type": "function", "function": {"name": call.function.name, "arguments": arguments}}


def _token_biases(biases: Mapping[str, float]) -> dict[int, float]:
    for token in biases:
        if not (token.isascii() and token.isdigit() and len(token) < 10):
            raise bad_request(f"logit_bias should map token ids to numbers, found {token[:40]!r}", "logit_bias")
    return {int(token): bias for token, bias in biases.items()}


def _explain(error: ValidationError) -> ApiError:
    """The first thing that pydantic found, in a sentence that names the field."""
    # Of the alternatives of a field, the one that failed deepest says most.
    first = max(error.errors(include_url=False), key=lambda problem: len(problem["loc"]))
    # The names of alternatives are pydantic's, such as list[TextPart].
    path = [str(part) for part in first["loc"] if part != "str" and "[" not in str(part)]
    name = ".".join(path)[:200]
    if first["type"] == "missing":
        return bad_request(f"the field {name} is missing", name)
    if first["type"] == "extra_forbidden":
        return bad_request(f"unknown field {name!r}; leave it out", name, "unknown_parameter")
    message = first["msg"].removeprefix("Value error, ")
    return bad_request(f"{name}: {message}, found {first['input']!r:.80}", name)


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON number")
