"""What clients and models send to the server: requests, and the calls of tools in answers."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from entrollm.serve.chat_fields import ChatRequest, check_tools
from entrollm.serve.errors import ApiError
from entrollm.serve.fields import (
    CompletionRequest,
    DetokenizeRequest,
    EmbeddingRequest,
    Sampling,
    TokenizeRequest,
    parse,
)
from entrollm.serve.forms import chat_form, guided_form
from entrollm.serve.grammar import Grammars
from entrollm.serve.output.choose import CALL_FORMATS, REASONING_FORMATS, OutputFormat, choose
from entrollm.serve.output.items import ToolCall
from entrollm.serve.responses_fields import ResponsesRequest
from tests.fuzz.mutate import mutate_text, to_text
from tests.fuzz.target import Target, mutated, write
from tests.support.paths import TINY_LLAMA

# A mutated answer comes in so many pieces at most.
_MOST_PIECES = 250
_SCHEMA = {
    "type": "object",
    "properties": {
        "a": {"type": "integer", "minimum": 0},
        "b": {"type": "array", "items": {"enum": ["x", 1, None]}, "maxItems": 3},
        "c": {"anyOf": [{"type": "string", "pattern": "^[a-z]+$"}, {"$ref": "#/$defs/d"}]},
    },
    "required": ["a"],
    "additionalProperties": False,
    "$defs": {"d": {"type": "object", "properties": {"d": {"$ref": "#/$defs/d"}}}},
}
_TOOL = {"type": "function", "function": {"name": "f", "description": "x", "parameters": _SCHEMA}}
_SAMPLING = {
    "model": "m",
    "temperature": 0.5,
    "top_p": 0.9,
    "seed": 3,
    "stop": ["x"],
    "logit_bias": {"3": -1.5},
    "presence_penalty": 0.5,
    "n": 2,
    "stream": False,
}
_MESSAGES = [
    {"role": "system", "content": [{"type": "text", "text": "Hello"}]},
    {"role": "user", "content": "x"},
    {
        "role": "assistant",
        "content": None,
        "tool_calls": [{"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}],
    },
    {"role": "tool", "tool_call_id": "1", "content": "3"},
]
_RESPONSES = {
    "input": [{"role": "user", "content": [{"type": "input_text", "text": "Hello"}]}],
    "instructions": "x",
    "tools": [{"type": "function", "name": "f", "parameters": _SCHEMA}],
    "text": {"format": {"type": "json_schema", "name": "n", "schema": _SCHEMA}},
    "max_output_tokens": 4,
}
_FORM = {"type": "json_schema", "json_schema": {"name": "n", "schema": _SCHEMA, "strict": True}}
_KINDS: Mapping[str, Any] = {
    "completion": CompletionRequest,
    "chat": ChatRequest,
    "embedding": EmbeddingRequest,
    "tokenize": TokenizeRequest,
    "detokenize": DetokenizeRequest,
    "responses": ResponsesRequest,
}
_REQUESTS: list[tuple[str, Any]] = [
    ("completion", {**_SAMPLING, "prompt": ["x", "y"], "max_tokens": 3, "logprobs": 2, "echo": True}),
    ("completion", {**_SAMPLING, "prompt": [1, 2], "guided_json": _SCHEMA}),
    ("completion", {**_SAMPLING, "prompt": "x", "guided_choice": ["a", "b"]}),
    ("completion", {**_SAMPLING, "prompt": "x", "guided_regex": "[a-c]{1,9}(x|y)*"}),
    ("completion", {**_SAMPLING, "prompt": "x", "guided_grammar": 'start: "a" start | "b"'}),
    ("chat", {**_SAMPLING, "messages": _MESSAGES, "tools": [_TOOL], "tool_choice": "auto", "max_tokens": 3}),
    ("chat", {**_SAMPLING, "messages": _MESSAGES[:2], "response_format": _FORM, "top_logprobs": 2, "logprobs": True}),
    ("embedding", {"model": "m", "input": ["x", "y"]}),
    ("tokenize", {"model": "m", "prompt": "x"}),
    ("detokenize", {"model": "m", "tokens": [1, 2]}),
    ("responses", _RESPONSES),
]


def _mutate_request(folder: Path, seed: tuple[str, Any], generator: random.Random) -> None:
    kind, body = seed
    write(folder / "kind", kind.encode())
    write(folder / "body", mutated(body, generator))


def _read_request(folder: Path) -> None:
    """Read a request, and make what the engine gets from it."""
    try:
        body = parse(_KINDS[(folder / "kind").read_text()], (folder / "body").read_bytes())
        if isinstance(body, Sampling):
            body.keywords(0, 3)
        if isinstance(body, ChatRequest):
            check_tools(body)
            for message in body.messages:
                json.dumps(message.to_template())
    except ApiError as error:
        json.dumps(error.to_json()).encode()
        raise ValueError(error.message) from None


class _Forms:
    """Compiles the grammars that requests ask for."""

    def __init__(self) -> None:
        self._grammars: Grammars | None = None

    def prepare(self, folder: Path) -> list[Any]:
        tokenizer = Tokenizer.from_file(str(TINY_LLAMA / "tokenizer.json"))
        self._grammars = Grammars(tokenizer, tokenizer.get_vocab_size(), [0])
        return [seed for seed in _REQUESTS if "guided" in str(seed) or "response_format" in seed[1]]

    def read(self, folder: Path) -> None:
        assert self._grammars is not None
        try:
            body = parse(_KINDS[(folder / "kind").read_text()], (folder / "body").read_bytes())
            form = chat_form if isinstance(body, ChatRequest) else guided_form
            grammar = form(self._grammars, body)
        except ApiError as error:
            raise ValueError(error.message) from None
        if grammar is not None:
            grammar.allowed()


def _prepare_calls(folder: Path) -> list[Any]:
    arguments = '{"a": 1, "b": ["x", null], "c": {"d": {}}}'
    texts = {
        "hermes": f'x <tool_call>\n{{"name": "f", "arguments": {arguments}}}\n</tool_call> y',
        "llama": f'<|python_tag|>{{"name": "f", "parameters": {arguments}}}',
        "mistral": f'[TOOL_CALLS] [{{"name": "f", "arguments": {arguments}}}]',
        "pythonic": "<|python_start|>[f(a=1, b=['x', None], c={'d': -2.5}), g()]<|python_end|>",
        "gemma": '<|tool_call>call:f{a:1,b:[<|"|>x<|"|>,null],c:{d:{}}}<tool_call|>',
        "harmony": f"<|channel|>analysis<|message|>x<|end|><|start|>assistant<|channel|>commentary to=functions.f "
        f"<|constrain|>json<|message|>{arguments}<|call|>",
    }
    named = [(name, text) for name, text in texts.items() if name in CALL_FORMATS]
    return [*named, ("function gemma", "<start_function_call>call:f{a:<escape>x<escape>}<end_function_call>")]


def _mutate_calls(folder: Path, seed: tuple[str, str], generator: random.Random) -> None:
    name, text = seed
    reasoning = generator.choice((None, *sorted(REASONING_FORMATS)))
    if reasoning is not None:
        markers = REASONING_FORMATS[reasoning]
        text = f"{markers.opening}why{markers.closing}{text}"
    data = text.encode()
    for _ in range(generator.choice((1, 1, 2, 5))):
        data = mutate_text(data, generator)
    step = generator.choice((1, 3, 17, 10**6))
    write(folder / "kind", to_text([name, reasoning, step]))
    write(folder / "text", data[: min(20_000, _MOST_PIECES * step)])


def _read_calls(folder: Path) -> None:
    name, reasoning, step = json.loads((folder / "kind").read_text())
    calls = choose("tools <start_function_call>").calls if name == "function gemma" else CALL_FORMATS[name]
    form = OutputFormat(calls, None if reasoning is None else REASONING_FORMATS[reasoning])
    parser = form.parser(["f", "g"], is_open=False)
    text = (folder / "text").read_bytes().decode("utf-8", "replace")
    items = []
    for begin in range(0, len(text), step):
        items += parser.push(text[begin : begin + step])
    items += parser.finish()
    found = [item for item in items if isinstance(item, ToolCall)]
    for call in found:
        if not isinstance(json.loads(call.arguments), dict) or call.name not in ("f", "g"):
            raise AssertionError(f"{call}")
    if not found:
        raise ValueError("no call")


_FORMS = _Forms()
SERVED_TARGETS: Mapping[str, Target] = {
    "requests": Target(lambda folder: _REQUESTS, _mutate_request, _read_request),
    "forms": Target(_FORMS.prepare, _mutate_request, _FORMS.read),
    "calls": Target(_prepare_calls, _mutate_calls, _read_calls),
}
