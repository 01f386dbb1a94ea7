"""Calls as GLM-4.5 and later models write them: a name with <arg_key> and <arg_value>, between <tool_call> markers."""

from __future__ import annotations

import json
import re

from entrollm.serve.output.arguments import parameter_rules, properties_of, value_of
from entrollm.serve.output.blocks import BlockParser, End, Marker
from entrollm.serve.output.items import Functions, Mark, Parser, ToolCall, dump

_OPEN, _CLOSE = "<tool_call>", "</tool_call>"
_TAGS = ("<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>")
_CALL = re.compile(r"\s*([\w.-]{1,64})\s*(?=<arg_key>|\Z)")
_ARGUMENT = re.compile(r"<arg_key>\s*(.*?)\s*</arg_key>\s*<arg_value>(.*?)(?:</arg_value>|\Z)\s*", re.DOTALL)


class Glm:
    """See CallFormat and BlockFormat.

    Args:
        is_spaced: whether lines are broken between tags, as by GLM-4.5 and 4.6. Both ways are read.
    """

    name = "glm"
    marks = (_OPEN, _CLOSE, *_TAGS)
    openings = (_OPEN,)
    first = ""
    separators = " \n\t\r"

    def __init__(self, *, is_spaced: bool = True) -> None:
        self._is_spaced = is_spaced

    def parser(self, functions: Functions) -> Parser:
        """See CallFormat."""
        return BlockParser(self, functions)

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
            argument = _ARGUMENT.match(text, position)
            if argument is None:
                return None
            found[argument[1]] = value_of(argument[2], schemas.get(argument[1]))
            position = argument.end()
        arguments = dump(found)
        return None if arguments is None else [ToolCall(begin[1], arguments)]

    def grammar(self, functions: Functions, mark: Mark, *, several: bool) -> str:
        """See CallFormat. Strings are free but for enumerations."""
        line = '"\\n"' if self._is_spaced else ""
        more = f" ({line} call)*" if several else ""
        rules = [
            f"start: call{more}",
            f"call: {' | '.join(f'call_{i}' for i in range(len(functions)))}",
            "TEXT: /[^<]*/",
        ]
        key, key_end, value, value_end = map(mark, _TAGS)
        around = (f'{key} "{{name}}" {key_end} {line} {value}', f"{value_end} {line}")
        for i, (name, schema) in enumerate(functions.items()):
            body, values = parameter_rules(i, schema, "TEXT", around)
            rules += [f"call_{i}: {mark(_OPEN)} {json.dumps(name)} {line} {body} {mark(_CLOSE)}", *values]
        return "\n".join(rules)
