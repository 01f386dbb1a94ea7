"""Calls as FunctionGemma and Gemma 4 write them: call:NAME{key:value} between markers, with marked strings."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from entrollm.serve.output.arguments import text_rules
from entrollm.serve.output.blocks import BlockFormat, End, Marker
from entrollm.serve.output.items import Functions, Mark, ToolCall, dump

_MOST_DEPTH = 64
_CALL = re.compile(r"\s*+call:([\w.-]{1,64}+)\s*+(?=\{)")
_KEY = re.compile(r"\s*+([^\s:,{}\[\]]++)\s*+:\s*+")
_PLAIN = re.compile(r"\s*(-?\d+(?:\.\d+)?(?:[eE][+-]?\d+)?|true|false|null|None)\s*")


class Gemma(BlockFormat):
    """See CallFormat and BlockFormat.

    Args:
        opening, closing: the markers around a call.
        quote: the marker on both sides of a string.
    """

    name = "gemma"

    def __init__(self, opening: str = "<|tool_call>", closing: str = "<tool_call|>", quote: str = '<|"|>') -> None:
        self._closing = closing
        self._quote = quote
        self.openings = (opening,)
        self.marks = (opening, closing, quote)

    def end(self, opening: str) -> End:
        """See BlockFormat."""
        return Marker(self._closing)

    def calls(self, block: str, functions: Functions) -> list[ToolCall] | None:
        """See BlockFormat."""
        text = block.removeprefix(self.openings[0]).removesuffix(self._closing)
        begin = _CALL.match(text)
        if begin is None or begin[1] not in functions:
            return None
        reader = _Reader(text, begin.end(), self._quote)
        try:
            value = reader.value(0)
        except ValueError:
            return None
        arguments = dump(value)
        return None if arguments is None or text[reader.position :].strip() else [ToolCall(begin[1], arguments)]

    def grammar(self, functions: Functions, mark: Mark, *, several: bool) -> str:
        """See CallFormat. Strings are free but for enumerations, and so are values of schemas with alternatives."""
        quote = mark(self._quote)
        rules = [
            f"start: call{'+' if several else ''}",
            f"call: {mark(self.openings[0])} ({' | '.join(f'call_{i}' for i in range(len(functions)))}) "
            f"{mark(self._closing)}",
            f"string: {quote} text",
            *text_rules(self._quote, quote, (self._closing,)),
            r"NUMBER: /-?(0|[1-9][0-9]{0,17})(\.[0-9]{1,17})?/",
            r"INTEGER: /-?(0|[1-9][0-9]{0,17})/",
            "NAME: /[A-Za-z_][A-Za-z0-9_]{0,63}/",
            'value: string | NUMBER | "true" | "false" | "null" | list | object',
            'list: "[" (value ("," value)*)? "]"',
            'object: "{" (NAME ":" value ("," NAME ":" value)*)? "}"',
        ]
        for i, (name, schema) in enumerate(functions.items()):
            rules.append(f"call_{i}: {json.dumps(f'call:{name}')} {_rule_of({'type': 'object', **schema}, quote, 0)}")
        return "\n".join(rules)


class _Reader:
    """Reads a value; raises ValueError where there is none."""

    def __init__(self, text: str, position: int, quote: str) -> None:
        self._text = text
        self._quote = quote
        self.position = position

    def value(self, depth: int) -> object:
        if depth > _MOST_DEPTH:
            raise ValueError
        self._skip_space()
        if self._take(self._quote):
            end = self._text.find(self._quote, self.position)
            if end < 0:
                raise ValueError
            text, self.position = self._text[self.position : end], end + len(self._quote)
            return text
        if self._take("{"):
            found: dict[str, object] = {}
            while not self._ends("}", has_items=bool(found)):
                key = _KEY.match(self._text, self.position)
                if key is None:
                    raise ValueError
                self.position = key.end()
                found[key[1].replace(self._quote, "").strip('"')] = self.value(depth + 1)
            return found
        if self._take("["):
            items: list[object] = []
            while not self._ends("]", has_items=bool(items)):
                items.append(self.value(depth + 1))
            return items
        plain = _PLAIN.match(self._text, self.position)
        if plain is None:
            raise ValueError
        self.position = plain.end()
        value: object = json.loads(plain[1].replace("None", "null"))
        return value

    def _ends(self, closing: str, *, has_items: bool) -> bool:
        """Pass the end of a list or object, or the comma before its next item."""
        self._skip_space()
        if self._take(closing):
            return True
        if has_items and not self._take(","):
            raise ValueError
        return False

    def _take(self, text: str) -> bool:
        is_here = self._text.startswith(text, self.position)
        self.position += len(text) if is_here else 0
        return is_here

    def _skip_space(self) -> None:
        while self._text[self.position : self.position + 1].isspace():
            self.position += 1


def _rule_of(schema: object, quote: str, depth: int) -> str:
    """The part of a rule that stands for values of a schema."""
    if not isinstance(schema, dict) or depth > _MOST_DEPTH:
        return "value"
    options = schema.get("enum")
    if isinstance(options, list) and options and all(isinstance(option, str) for option in options):
        return f"({' | '.join(f'{quote} {json.dumps(option)} {quote}' for option in options if option)})"
    kind = schema.get("type")
    if kind == "object" and isinstance(schema.get("properties", {}), dict):
        return _object_rule(schema, quote, depth)
    if kind == "array" and "items" in schema:
        item = _rule_of(schema["items"], quote, depth + 1)
        return f'"[" ({item} ("," {item})*)? "]"'
    plain = {"string": "string", "integer": "INTEGER", "number": "NUMBER", "boolean": '("true" | "false")'}
    return plain.get(kind, "value") if isinstance(kind, str) else "value"


def _object_rule(schema: Mapping[str, Any], quote: str, depth: int) -> str:
    properties: Mapping[str, Any] = schema.get("properties", {})
    if not properties:
        return "object"
    wanted = schema.get("required")
    required = [key for key in properties if isinstance(wanted, list) and key in wanted]
    terms = {key: f"{json.dumps(f'{key}:')} {_rule_of(value, quote, depth + 1)}" for key, value in properties.items()}
    body = ' "," '.join(terms[key] for key in required)
    rest = [terms[key] for key in properties if key not in required]
    if required:
        body += "".join(f' ("," {term})?' for term in rest)
        return f'"{{" {body} "}}"'
    bodies = [term + "".join(f' ("," {later})?' for later in rest[i + 1 :]) for i, term in enumerate(rest)]
    return f'"{{" ({" | ".join(bodies)})? "}}"'
