"""Chat templates: the jinja programs that models ship to lay out a dialogue."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from entrollm.errors import FormatError

Message = Mapping[str, object]

# What a template can fail with: its own errors, and those of the Python operators and methods it calls.
_TEMPLATE_FAILURES = (
    jinja2.TemplateError,
    TypeError,
    ValueError,
    LookupError,
    ArithmeticError,
    AttributeError,
    RecursionError,
    MemoryError,
)


class _RefusalError(Exception):
    """The template called raise_exception: the messages are not what it expects."""


class _GenerationBlock(Extension):
    """Renders {% generation %} blocks, which only matter in training, as their content."""

    tags = {"generation"}  # noqa: RUF012 (the base class declares a set)

    def parse(self, parser: Parser) -> nodes.Node | list[nodes.Node]:
        """Replace the block by its body."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class ChatTemplate:
    """A compiled chat template; it runs in a sandbox, since it comes with the model.

    Args:
        text: the jinja source.
        source: the file it came from, for messages.
        special_tokens: bos_token, eos_token and so on, which the template can name.
    Raises:
        FormatError: the source is not valid jinja.
    """

    def __init__(self, text: str, source: str, special_tokens: Mapping[str, str]) -> None:
        self._source = source
        self._special_tokens = dict(special_tokens)
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlock, loopcontrols]
        )
        environment.filters["tojson"] = _to_json
        environment.globals.update(raise_exception=_refuse, strftime_now=_now)
        try:
            self._template = environment.from_string(text)
        except (jinja2.TemplateError, RecursionError) as error:
            raise FormatError(f"{source}: the chat template is not valid: {error}") from error

    def render(self, messages: Sequence[Message], *, add_generation_prompt: bool = True, **variables: object) -> str:
        """Lay a dialogue out as text.

        Args:
            messages: each with a "role" and, usually, a "content".
            add_generation_prompt: end with the beginning of an answer.
            variables: more names for the template, such as enable_thinking.
        Raises:
            TypeError: messages is not a sequence of mappings with a string "role".
            ValueError: there are no messages, or the template refuses them.
            FormatError: the template fails.
        """
        _check_messages(messages)
        names = {**self._special_tokens, "tools": None, "documents": None, **variables}
        names |= {"messages": [dict(message) for message in messages], "add_generation_prompt": add_generation_prompt}
        try:
            return self._template.render(names)
        except _RefusalError as refusal:
            raise ValueError(f"{self._source}: the chat template refuses these messages: {refusal}") from refusal
        except _TEMPLATE_FAILURES as error:
            raise FormatError(f"{self._source}: the chat template failed: {error}") from error


def _check_messages(messages: Sequence[Message]) -> None:
    if isinstance(messages, (str, bytes, Mapping)) or not isinstance(messages, Sequence):
        raise TypeError(f"messages should be a list of {{'role': ..., 'content': ...}}, got {type(messages).__name__}")
    if not messages:
        raise ValueError("messages should not be empty")
    for message in messages:
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise TypeError(f"each message should be a mapping with a string 'role', got {message!r}")


def _to_json(
    value: object,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Unlike jinja's own filter, without HTML escapes."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _refuse(message: str) -> str:
    raise _RefusalError(message)


def _now(pattern: str) -> str:
    return datetime.now().strftime(pattern)
