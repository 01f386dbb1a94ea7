"""Calls as DeepSeek V3, R1 and V3.1 models write them: a name and JSON between markers of full-width characters."""

from __future__ import annotations

import json
import re
from collections.abc import Collection

from entrollm.serve.output.blocks import BlockFormat, End, Marker
from entrollm.serve.output.items import Functions, Mark, ToolCall, arguments_rule, call_of, parse_json

_OPEN, _CLOSE = "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"
_CALL_OPEN, _SEPARATOR, _CALL_CLOSE = "<｜tool▁call▁begin｜>", "<｜tool▁sep｜>", "<｜tool▁call▁end｜>"
_FENCE = "```"
_NAME = re.compile(r"[\w.-]{1,64}")


class DeepSeek(BlockFormat):
    """See CallFormat and BlockFormat.

    Args:
        is_fenced: whether calls are asked for as V3 and R1 write them: the word "function", the name, and a fenced
            block; V3.1 writes the name and JSON. Both are read.
    """

    name = "deepseek"
    marks = (_OPEN, _CLOSE, _CALL_OPEN, _SEPARATOR, _CALL_CLOSE)
    openings = (_OPEN,)

    def __init__(self, *, is_fenced: bool = True) -> None:
        self._is_fenced = is_fenced

    def end(self, opening: str) -> End:
        """See BlockFormat."""
        return Marker(_CLOSE)

    def calls(self, block: str, functions: Collection[str]) -> list[ToolCall] | None:
        """See BlockFormat."""
        before, *parts = block.removeprefix(_OPEN).removesuffix(_CLOSE).split(_CALL_OPEN)
        calls = [_call(part, functions) for part in parts]
        known = [call for call in calls if call is not None]
        return known if known and len(known) == len(calls) and not before.strip() else None

    def grammar(self, functions: Functions, mark: Mark, *, several: bool) -> str:
        """See CallFormat."""
        between = '"\\n" ' if self._is_fenced else ""
        more = f" ({between}call)*" if several else ""
        rules = [
            f"start: {mark(_OPEN)} call{more} {mark(_CLOSE)}",
            f"call: {' | '.join(f'call_{i}' for i in range(len(functions)))}",
        ]
        for i, (name, schema) in enumerate(functions.items()):
            if self._is_fenced:
                opening = json.dumps(name + "\n```json\n")
                inside = f'"function" {mark(_SEPARATOR)} {opening} arguments_{i} "\\n```"'
            else:
                inside = f"{json.dumps(name)} {mark(_SEPARATOR)} arguments_{i}"
            rules.append(f"call_{i}: {mark(_CALL_OPEN)} {inside} {mark(_CALL_CLOSE)}")
            rules.append(arguments_rule(f"arguments_{i}", schema))
        return "\n".join(rules)


def _call(text: str, names: Collection[str]) -> ToolCall | None:
    """One call, perhaps without its end."""
    first, separator, second = text.rstrip().removesuffix(_CALL_CLOSE).partition(_SEPARATOR)
    if not separator:
        return None
    name, fence, arguments = (part.strip() for part in second.partition(_FENCE))
    if fence and arguments.endswith(_FENCE) and _NAME.fullmatch(name):
        arguments = arguments.removesuffix(_FENCE).removeprefix("json")
    else:
        name, arguments = first.strip(), second
    return call_of({"name": name, "arguments": parse_json(arguments)}, names)
