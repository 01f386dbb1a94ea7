"""The channels of GPT-OSS: analysis is reasoning, final is text, and commentary to a function is a call."""

from __future__ import annotations

import json
import re
from collections.abc import Collection

from entrollm.serve.output.items import (
    Functions,
    Item,
    Mark,
    Parser,
    Reasoning,
    ToolCall,
    arguments_rule,
    call_of,
    overlap,
    parse_json,
)

_START, _CHANNEL, _MESSAGE, _CONSTRAIN = "<|start|>", "<|channel|>", "<|message|>", "<|constrain|>"
_ENDS = ("<|end|>", "<|call|>", "<|return|>")
_NAME = re.compile(r"\s*(\w+)")
_RECIPIENT = re.compile(r"\bto=([^\s<]+)")
_FUNCTIONS = "functions."


class Harmony:
    """See CallFormat."""

    name = "harmony"
    marks = (_START, _CHANNEL, _MESSAGE, _CONSTRAIN, *_ENDS)

    def parser(self, functions: Functions) -> Parser:
        """See CallFormat."""
        return HarmonyParser(functions)

    def grammar(self, functions: Functions, mark: Mark, *, several: bool) -> str:
        """See CallFormat. The model may reason first; its calls come one to an answer."""
        rules = [
            f"start: analysis? call_header ({' | '.join(f'call_{i}' for i in range(len(functions)))})",
            f'analysis: {mark(_CHANNEL)} "analysis" {mark(_MESSAGE)} TEXT {mark("<|end|>")} {mark(_START)} "assistant"',
            f'call_header: {mark(_CHANNEL)} "commentary to=functions."',
            "TEXT: /(.|\\n)*/",
        ]
        for i, (name, schema) in enumerate(functions.items()):
            rules.append(f'call_{i}: {json.dumps(name + " ")} {mark(_CONSTRAIN)} "json" {mark(_MESSAGE)} arguments_{i}')
            rules.append(arguments_rule(f"arguments_{i}", schema))
        return "\n".join(rules)


class HarmonyParser:
    """Splits messages into what their channels mean; see Parser.

    Args:
        names: of the functions that may be called.
    """

    def __init__(self, names: Collection[str]) -> None:
        self._names = frozenset(names)
        self._held = ""
        self._header: str | None = None  # of the message whose text comes now
        self._is_call = False
        self._is_reasoning = False
        self._is_first = True

    def push(self, text: str) -> list[Item]:
        """Add text and return what is complete now, in order."""
        self._held += text
        found: list[Item] = []
        while self._held and (self._begin() if self._header is None else self._go_on(found)):
            pass
        return found

    def finish(self) -> list[Item]:
        """Return what was held back; a call that only lacks its end is one."""
        held, self._held = self._held, ""
        if self._header is None:
            is_part = _START.startswith(held) or held.startswith(_START)
            return [held] if held.strip() and not is_part else []
        return self._message(self._header, held)

    def _begin(self) -> bool:
        """Read a header."""
        if self._is_first and not _may_be_header(self._held):
            self._header, self._is_first = "", False  # an answer without channels
            self._is_call = self._is_reasoning = False
            return True
        end = self._held.find(_MESSAGE)
        if end < 0:
            return False
        self._header, self._held = self._held[: end + len(_MESSAGE)], self._held[end + len(_MESSAGE) :]
        self._is_call = _RECIPIENT.search(self._header) is not None
        self._is_reasoning = _channel(self._header) == "analysis"
        self._is_first = False
        return True

    def _go_on(self, found: list[Item]) -> bool:
        """Read text of a message, and say whether it ended."""
        assert self._header is not None
        markers = (*_ENDS, _START, _CHANNEL)
        ends = [(at, marker) for marker in markers if (at := self._held.find(marker)) >= 0]
        if ends:
            at, marker = min(ends)
            found += self._message(self._header, self._held[:at])
            self._header = None
            # A message that lacks its end is followed by a header.
            self._held = self._held[at + len(marker) if marker in _ENDS else at :]
            return True
        if not self._is_call:
            cut = len(self._held) - overlap(self._held, markers)
            found += self._message(self._header, self._held[:cut])
            self._held = self._held[cut:]
        return False

    def _message(self, header: str, text: str) -> list[Item]:
        """What a part of a message means, or all of it if it is a call."""
        if self._is_call:
            call = self._call(header, text)
            return [header + text] if call is None else [call]
        if not text:
            return []
        return [Reasoning(text) if self._is_reasoning else text]

    def _call(self, header: str, text: str) -> ToolCall | None:
        recipient = _RECIPIENT.search(header)
        name = recipient[1].removeprefix(_FUNCTIONS) if recipient else ""
        return call_of({"name": name, "arguments": parse_json(text or "{}")}, self._names)


def _channel(header: str) -> str:
    name = _NAME.match(header.partition(_CHANNEL)[2])
    return name[1] if name else ""


def _may_be_header(text: str) -> bool:
    """Whether an answer that begins like this may begin with a header; the prompt ends with the role."""
    begins = text.lstrip()
    return any(begins.startswith(marker) or marker.startswith(begins) for marker in (_CHANNEL, _START, "to="))
