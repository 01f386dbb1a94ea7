"""What the text of an answer is split into, and what the formats of calls have in common."""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn, Protocol

# Writes a marker as a Lark grammar of llguidance names it.
Mark = Callable[[str], str]
# The JSON schemas of the arguments, by name of the function.
Functions = Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True)
class Reasoning:
    """Text that the model writes for itself."""

    text: str


def _new_id() -> str:
    return f"call_{uuid.uuid4().hex[:24]}"


@dataclass(frozen=True)
class ToolCall:
    """A call that a model asks for.

    Attributes:
        name: of the function.
        arguments: a JSON object, as text.
        call_id: names the call in later messages.
    """

    name: str
    arguments: str
    call_id: str = field(default_factory=_new_id)


Item = str | Reasoning | ToolCall


class Parser(Protocol):
    """Splits a text that comes in pieces. What looks like a call and is not one stays text."""

    def push(self, text: str) -> list[Item]:
        """Add text and return what is complete now, in order."""

    def finish(self) -> list[Item]:
        """Return what was held back."""


class Gather:
    """Passes white space on with the text behind it; see Parser.

    Parsers hold white space back and look at all of it with every piece, which would take long where it comes in
    many pieces.

    Args:
        parser: reads the text.
    """

    def __init__(self, parser: Parser) -> None:
        self._parser = parser
        self._space: list[str] = []

    def push(self, text: str) -> list[Item]:
        """Add text and return what is complete now, in order."""
        if not text or text.isspace():
            self._space.append(text)
            return []
        return self._parser.push(self._take() + text)

    def finish(self) -> list[Item]:
        """Return what was held back."""
        return self._parser.push(self._take()) + self._parser.finish()

    def _take(self) -> str:
        space, self._space = "".join(self._space), []
        return space


class CallFormat(Protocol):
    """How a family of models writes calls.

    Attributes:
        name: what the option calls it.
        marks: the markers that may be special tokens, which texts otherwise leave out.
    """

    name: str

    @property
    def marks(self) -> tuple[str, ...]: ...

    def parser(self, functions: Functions) -> Parser:
        """A parser of one answer, for calls of these functions."""

    def grammar(self, functions: Functions, mark: Mark, *, several: bool) -> str:
        """The Lark grammar of an answer that consists of calls.

        Args:
            functions: those of which it may call any.
            mark: writes markers.
            several: whether there may be more than one call.
        """


def overlap(text: str, markers: Collection[str]) -> int:
    """The length of the longest end of `text` that begins one of `markers`, short of all of it."""
    longest = min(len(text), max(map(len, markers)) - 1)
    for size in range(longest, 0, -1):
        if any(len(marker) > size and marker.startswith(text[-size:]) for marker in markers):
            return size
    return 0


def call_of(value: object, names: Collection[str], keys: Sequence[str] = ("arguments",)) -> ToolCall | None:
    """The call that `{"name": ..., KEY: {...}}` asks for; `None` if it is none of a known function.

    Args:
        value: from JSON.
        names: the known functions.
        keys: names under which the arguments may be.
    """
    if not isinstance(value, dict) or not isinstance(value.get("name"), str) or value["name"] not in names:
        return None
    arguments: object = next((value[key] for key in keys if key in value), {})
    if not isinstance(arguments, dict):
        return None
    text = dump(arguments)
    return None if text is None else ToolCall(value["name"], text)


def parse_json(text: str) -> object:
    """The value of a JSON text, `None` if it is not valid."""
    try:
        return json.loads(text, parse_constant=_refuse)
    except (ValueError, RecursionError):
        return None


def dump(value: object) -> str | None:
    """A value as JSON; `None` if it holds infinity or lies too deep."""
    try:
        return json.dumps(value, allow_nan=False)
    except (ValueError, RecursionError):
        return None


def arguments_rule(name: str, schema: Mapping[str, Any]) -> str:
    """A Lark rule for JSON of a schema on one line."""
    compact = json.dumps({**schema, "x-guidance": {"whitespace_flexible": False}})
    return f"{name}: %json {compact}"


def _refuse(name: str) -> NoReturn:
    raise ValueError(name)
