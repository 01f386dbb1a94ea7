"""Calls as Mistral models write them: JSON behind [TOOL_CALLS], in a list or one by one."""

from __future__ import annotations

import json
import re
import secrets
import string
from dataclasses import replace

from entrollm.serve.output.blocks import BlockFormat, Brackets, End
from entrollm.serve.output.items import Functions, Mark, ToolCall, arguments_rule, call_of, parse_json

_OPEN, _ARGUMENTS, _ID = "[TOOL_CALLS]", "[ARGS]", "[CALL_ID]"
_ONE = re.compile(r"\s*+([\w.-]{1,64}+)\s*+(?:\[CALL_ID\]\s*+\w*+\s*+)?+(?:\[ARGS\])?+\s*+(?=\{)")
_ID_CHARACTERS = string.ascii_letters + string.digits


class Mistral(BlockFormat):
    """See CallFormat and BlockFormat.

    Args:
        is_listed: whether calls are asked for as a list, as by models before the marker [ARGS] came up. Both are read.
    """

    name = "mistral"
    marks = (_OPEN, _ARGUMENTS, _ID)
    openings = (_OPEN,)

    def __init__(self, *, is_listed: bool = True) -> None:
        self._is_listed = is_listed

    def end(self, opening: str) -> End:
        """See BlockFormat."""
        return _End()

    def calls(self, block: str, functions: Functions) -> list[ToolCall] | None:
        """See BlockFormat."""
        text = block.removeprefix(_OPEN)
        single = _ONE.match(text)
        values: object
        if single:
            arguments = parse_json(text[single.end() :])
            values = [{"name": single[1], "arguments": arguments}]
        else:
            values = parse_json(text)
        if not isinstance(values, list) or not values:
            return None
        calls = [call_of(value, functions) for value in values]
        known = [replace(call, call_id=_new_id()) for call in calls if call is not None]
        return known if len(known) == len(calls) else None

    def grammar(self, functions: Functions, mark: Mark, *, several: bool) -> str:
        """See CallFormat."""
        calls = " | ".join(f"call_{i}" for i in range(len(functions)))
        if self._is_listed:
            more = ' (", " call)*' if several else ""
            rules = [f'start: {mark(_OPEN)} "[" call{more} "]"', f"call: {calls}"]
        else:
            rules = [f"start: call{'+' if several else ''}", f"call: {calls}"]
        for i, (name, schema) in enumerate(functions.items()):
            if self._is_listed:
                opening = json.dumps(f'{{"name": {json.dumps(name)}, "arguments": ')
                rules.append(f'call_{i}: {opening} arguments_{i} "}}"')
            else:
                rules.append(f"call_{i}: {mark(_OPEN)} {json.dumps(name)} {mark(_ARGUMENTS)} arguments_{i}")
            rules.append(arguments_rule(f"arguments_{i}", schema))
        return "\n".join(rules)


class _End:
    """The end of a block, whose markers look like brackets."""

    def __init__(self) -> None:
        self._brackets = Brackets('"')
        self._start: int | None = None

    def feed(self, text: str) -> int | None:
        if self._start is None:
            inside = text[len(_OPEN) :]
            single = _ONE.match(inside)
            if single:
                self._start = len(_OPEN) + single.end()
            elif inside.lstrip()[:1] == "[":
                self._start = len(text) - len(inside.lstrip())
            elif len(inside) > 256:
                return len(text)  # a name does not become this long
            else:
                return None
        length = self._brackets.feed(text[self._start :])
        return None if length is None else self._start + length


def _new_id() -> str:
    """The templates of these models take nine letters and digits only."""
    return "".join(secrets.choice(_ID_CHARACTERS) for _ in range(9))
