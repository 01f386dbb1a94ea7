"""Calls of tools as Hermes and Qwen models write them: JSON between <tool_call> and </tool_call>."""

from __future__ import annotations

import json
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

OPEN, CLOSE = "<tool_call>", "</tool_call>"


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
    call_id: str = field(default_factory=lambda: f"call_{uuid.uuid4().hex[:24]}")


class ToolCallFinder:
    """Splits a text that comes in pieces into plain text and calls.

    What looks like a call and is not one, because its JSON is malformed or names an unknown function, stays text.

    Args:
        names: of the functions that may be called.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self._names = frozenset(names)
        self._held = ""

    def push(self, text: str) -> list[str | ToolCall]:
        """Add text and return what is complete now, in order."""
        self._held += text
        found: list[str | ToolCall] = []
        while self._held:
            start = self._held.find(OPEN)
            if start < 0:
                # The end may be the beginning of a call, with the white space before it.
                cut = len(self._held) - _overlap(self._held)
                cut = len(self._held[:cut].rstrip())
                found.append(self._held[:cut])
                self._held = self._held[cut:]
                break
            end = self._held.find(CLOSE, start)
            if end < 0:
                before = self._held[:start].rstrip()
                found.append(before)
                self._held = self._held[len(before) :]
                break
            whole, self._held = self._held[: end + len(CLOSE)], self._held[end + len(CLOSE) :]
            call = self._parse(whole[start + len(OPEN) : end])
            found += [whole] if call is None else [whole[:start].rstrip(), call]
        return [item for item in found if item != ""]

    def finish(self) -> list[str | ToolCall]:
        """Return what was held back; a call that only lacks its end is one."""
        held, self._held = self._held, ""
        before, opened, inside = held.partition(OPEN)
        call = self._parse(inside) if opened else None
        found: list[str | ToolCall] = [held] if call is None else [before.rstrip(), call]
        return [item for item in found if item != ""]

    def _parse(self, text: str) -> ToolCall | None:
        try:
            value = json.loads(text)
        except (ValueError, RecursionError):
            return None
        if not isinstance(value, dict) or value.get("name") not in self._names:
            return None
        arguments = value.get("arguments", {})
        return ToolCall(value["name"], json.dumps(arguments)) if isinstance(arguments, dict) else None


def call_grammar(functions: Mapping[str, Mapping[str, Any]], *, several: bool) -> str:
    """The Lark grammar of an answer that consists of calls.

    Args:
        functions: the JSON schema of the arguments, by name of the function.
        several: whether there may be more than one call.
    """
    more = ' ("\\n" call)*' if several else ""
    rules = [f"start: call{more}", f"call: {' | '.join(_rules(functions))}"]
    for rule, (name, schema) in zip(_rules(functions), functions.items(), strict=True):
        opening = json.dumps(f'{OPEN}\n{{"name": {json.dumps(name)}, "arguments": ')
        closing = json.dumps(f"}}\n{CLOSE}")
        compact = json.dumps({**schema, "x-guidance": {"whitespace_flexible": False}})
        rules += [f"{rule}: {opening} arguments_{rule} {closing}", f"arguments_{rule}: %json {compact}"]
    return "\n".join(rules)


def _rules(functions: Mapping[str, Mapping[str, Any]]) -> list[str]:
    return [f"function_{number}" for number in range(len(functions))]


def _overlap(text: str) -> int:
    longest = min(len(text), len(OPEN) - 1)
    return next((size for size in range(longest, 0, -1) if text.endswith(OPEN[:size])), 0)
