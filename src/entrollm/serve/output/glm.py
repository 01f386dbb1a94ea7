"""Calls as GLM-4.5 and later models write them: a name with <arg_key> and <arg_value>, between <tool_call> markers."""

from __future__ import annotations

import json
import re

from entrollm.serve.output.arguments import parameter_rules, properties_of, text_rules, value_of
from entrollm.serve.output.blocks import BlockFormat, End, Marker
from entrollm.serve.output.items import Functions, Mark, ToolCall, dump

_OPEN, _CLOSE = "<tool_call>", "</tool_call>"
_TAGS = ("<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>")
_KEY, _KEY_END, _VALUE, _VALUE_END = _TAGS
_CALL = re.compile(r"\s*+([\w.-]{1,64}+)\s*+(?=<arg_key>|\Z)")
_SPACE = re.compile(r"\s*+")


class Glm(BlockFormat):
    """See CallFormat and BlockFormat.

    Args:
        is_spaced: whether lines are broken between tags, as by GLM-4.5 and 4.6. Both ways are read.
    """

    name = "glm"
    marks = (_OPEN, _CLOSE, *_TAGS)
    openings = (_OPEN,)

    def __init__(self, *, is_spaced: bool = True) -> None:
        self._is_spaced = is_spaced

    def end(self, opening: str) -> End:
        """See BlockFormat."""
        return Marker(_CLOSE)

    def calls(self, block: str, functions: Functions) -> list[ToolCall] | None:
        """See BlockFormat."""
        text = block.removeprefix(_OPEN).removesuffix(_CLOSE)
        begin = _CALL.match(text)
        if begin is None or begin[1] not in functions:
            return None
        schemas = properties_of(functions[begin[1]])
        found: dict[str, object] = {}
        position = begin.end()
        while position < len(text):
            argument = _argument(text, position)
            if argument is None:
                return None
            key, value, position = argument
            found[key] = value_of(value, schemas.get(key))
        arguments = dump(found)
        return None if arguments is None else [ToolCall(begin[1], arguments)]

    def grammar(self, functions: Functions, mark: Mark, *, several: bool) -> str:
        """See CallFormat. Strings are free but for enumerations."""
        line = '"\\n"' if self._is_spaced else ""
        more = f" ({line} call)*" if several else ""
        rules = [
            f"start: call{more}",
            f"call: {' | '.join(f'call_{i}' for i in range(len(functions)))}",
            *text_rules(_VALUE_END, mark(_VALUE_END), (_CLOSE,)),
        ]
        key, key_end, value, value_end = map(mark, _TAGS)
        around = (f'{key} "{{name}}" {key_end} {line} {value}', value_end, line)
        for i, (name, schema) in enumerate(functions.items()):
            body, values = parameter_rules(i, schema, around)
            rules += [f"call_{i}: {mark(_OPEN)} {json.dumps(name)} {line} {body} {mark(_CLOSE)}", *values]
        return "\n".join(rules)


def _argument(text: str, start: int) -> tuple[str, str, int] | None:
    """The key and value of the argument that begins at `start`, and where the next one may; `None` if none does."""
    key_end = text.find(_KEY_END, start)
    if key_end < 0 or not text.startswith(_KEY, start):
        return None
    value = _end_of_space(text, key_end + len(_KEY_END))
    if not text.startswith(_VALUE, value):
        return None
    value += len(_VALUE)
    end = text.find(_VALUE_END, value)
    rest = len(text) if end < 0 else _end_of_space(text, end + len(_VALUE_END))
    return text[start + len(_KEY) : key_end].strip(), text[value : end if end >= 0 else rest], rest


def _end_of_space(text: str, start: int) -> int:
    space = _SPACE.match(text, start)
    return space.end() if space else start
