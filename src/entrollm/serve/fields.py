"""The fields of requests: which are followed, which change nothing, and which are refused by name."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import partial
from typing import Annotated, Any, Literal, NoReturn, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, WithJsonSchema

from entrollm.engine.options import GenerateKeywords
from entrollm.serve.errors import ApiError, bad_request

MAX_CHOICES = 16
_MAX_STOPS = 16
_MAX_BIASES = 1024
_MAX_PROMPTS = 64
_MAX_INPUTS = 2048
_MAX_PATTERN = 64 << 10
_MAX_GUIDED_CHOICES = 256

# Fields of OpenAI's that say who asks or how to bill and store, and nothing about the answer.
_INERT = frozenset(
    {"user", "metadata", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention"}
)
# Fields that would change the answer and are not implemented, with the values at which they do nothing.
_UNSUPPORTED: Mapping[str, tuple[object, ...]] = {
    "audio": (),
    "background": (False,),
    "best_of": (1,),
    "conversation": (),
    "function_call": (),
    "functions": ([],),
    "modalities": (["text"],),
    "moderation": (),
    "max_tool_calls": (),
    "parallel_tool_calls": (True, False),
    "prediction": (),
    "previous_response_id": (),
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


_STOP = {"type": "string", "minLength": 1, "maxLength": 1024}
_STOPS = WithJsonSchema(
    {"anyOf": [_STOP, {"type": "array", "items": _STOP, "maxItems": _MAX_STOPS}, {"type": "null"}], "default": None}
)


def _listed(value: object) -> object:
    return [value] if isinstance(value, str) else value


def _prompts(value: object, most: int = _MAX_PROMPTS) -> object:
    """The prompts of a request as a list, each of them text or token ids."""
    prompts = value if isinstance(value, list) else [value]
    if isinstance(value, list) and value and all(type(token) is int for token in value):
        prompts = [value]
    if not 1 <= len(prompts) <= most:
        raise ValueError(f"should hold 1 to {most} prompts")
    for prompt in prompts:
        is_ids = (
            isinstance(prompt, list) and prompt and all(type(token) is int and 0 <= token < 2**31 for token in prompt)
        )
        if not (isinstance(prompt, str) or is_ids):
            raise ValueError("should be a text, token ids, or a list of either")
    return prompts


# Fields of which each says what an answer must look like.
GUIDES = ("guided_json", "guided_regex", "guided_grammar", "guided_choice")
_TOKEN_IDS = {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 2**31 - 1}, "minItems": 1}
_ONE_PROMPT = [{"type": "string"}, _TOKEN_IDS]


def _described(most: int) -> WithJsonSchema:
    several = {"type": "array", "items": {"anyOf": _ONE_PROMPT}, "minItems": 1, "maxItems": most}
    return WithJsonSchema({"anyOf": [*_ONE_PROMPT, several]})


Prompts = Annotated[list[Any], BeforeValidator(_prompts), _described(_MAX_PROMPTS)]
Inputs = Annotated[list[Any], BeforeValidator(partial(_prompts, most=_MAX_INPUTS)), _described(_MAX_INPUTS)]


def _boolean(value: object) -> object:
    if value is not None and not isinstance(value, bool):  # 0 equals False
        raise ValueError("should be false")
    return value


# An option that can only be off.
Off = Annotated[Literal[False] | None, BeforeValidator(_boolean)]


class Strict(BaseModel):
    """A part of a request, in which every field is known and nothing is converted."""

    # Built when first used, which keeps the start short.
    model_config = ConfigDict(extra="forbid", strict=True, defer_build=True)


class StreamOptions(Strict):
    """Options of a stream."""

    include_usage: bool | None = None
    include_obfuscation: Off = None


class Sampling(Strict):
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
    stop: Annotated[Annotated[list[Stop], Field(max_length=_MAX_STOPS)] | None, BeforeValidator(_listed), _STOPS] = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    guided_json: dict[str, Any] | None = None
    guided_regex: Annotated[str, Field(max_length=_MAX_PATTERN)] | None = None
    guided_grammar: Annotated[str, Field(max_length=_MAX_PATTERN)] | None = None
    guided_choice: Annotated[list[Stop], Field(min_length=1, max_length=_MAX_GUIDED_CHOICES)] | None = None

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
            "max_tokens": max_tokens if self.max_tokens is None else self.max_tokens,
        }


class CompletionRequest(Sampling):
    """The body of /v1/completions."""

    prompt: Prompts
    logprobs: Annotated[int, Field(ge=0, le=5)] | None = None
    echo: bool | None = None
    max_tokens: Annotated[int, Field(ge=0)] | None = None


class EmbeddingRequest(Strict):
    """The body of /v1/embeddings."""

    model: str | None = None
    input: Inputs
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: Annotated[int, Field(ge=1)] | None = None
    pooling: Literal["mean", "last"] | None = None


class TokenizeRequest(Strict):
    """The body of /tokenize."""

    model: str | None = None
    prompt: str
    add_special_tokens: bool = True


class DetokenizeRequest(Strict):
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
            # By type as well, since 0 equals False.
            harmless = any(value == each and type(value) is type(each) for each in _UNSUPPORTED[name])
            if value is not None and not harmless:
                raise bad_request(f"{name} is not supported here; leave it out", name, "unsupported_parameter")
        elif name not in _INERT:
            raise bad_request(f"unknown field {name[:80]!r}; leave it out", name[:80], "unknown_parameter")
    try:
        return kind.model_validate(fields)
    except ValidationError as error:
        raise _explain(error) from None


def _token_biases(biases: Mapping[str, float]) -> dict[int, float]:
    for token in biases:
        if not (token.isascii() and token.isdigit() and len(token) < 10):
            raise bad_request(f"logit_bias should map token ids to numbers, found {token[:40]!r}", "logit_bias")
    return {int(token): bias for token, bias in biases.items()}


def _explain(error: ValidationError) -> ApiError:
    """The first thing that pydantic found, in a sentence that names the field."""
    # Of the alternatives of a field, the one that failed deepest says most, and one of another type least.
    problems = error.errors(include_url=False)
    first = max(problems, key=lambda problem: (len(problem["loc"]), not problem["type"].endswith("_type")))
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
