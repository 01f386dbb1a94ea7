"""Calls as Qwen3-Coder models write them: <function=NAME> with <parameter=NAME> in it, between <tool_call> markers."""

from __future__ import annotations

import json
import re

from entrollm.serve.output.arguments import parameter_rules, properties_of, text_rules, value_of
from entrollm.serve.output.blocks import BlockFormat, End, Marker
from entrollm.serve.output.items import Functions, Mark, ToolCall, dump

_OPEN, _CLOSE = "<tool_call>", "</tool_call>"
_PARAMETER_END = "</parameter>"
_CALL = re.compile(r"<function=([^>\s]{1,64}+)>")
# A model may leave out the end of a parameter where the next one begins.
_PARAMETER = re.compile(r"\s*+<parameter=([^>\s]++)>(.*?)(?:</parameter>|(?=<parameter=)|\Z)\s*+", re.DOTALL)


class QwenCoder(BlockFormat):
    """See CallFormat and BlockFormat."""

    name = "qwen-coder"
    marks = (_OPEN, _CLOSE)
    openings = (_OPEN,)

    def end(self, opening: str) -> End:
        """See BlockFormat."""
        return Marker(_CLOSE)

    def calls(self, block: str, functions: Functions) -> list[ToolCall] | None:
        """See BlockFormat."""
        text = block.removeprefix(_OPEN).removesuffix(_CLOSE).strip()
        call = _CALL.match(text)
        if call is None or call[1] not in functions:
            return None
        schemas = properties_of(functions[call[1]])
        found: dict[str, object] = {}
        inside = text[call.end() :].removesuffix("</function>").rstrip()
        position = 0
        while position < len(inside):
            parameter = _PARAMETER.match(inside, position)
            if parameter is None:
                return None
            value = parameter[2].removeprefix("\n").removesuffix("\n")
            found[parameter[1]] = value_of(value, schemas.get(parameter[1]))
            position = parameter.end()
        arguments = dump(found)
        return None if arguments is None else [ToolCall(call[1], arguments)]

    def grammar(self, functions: Functions, mark: Mark, *, several: bool) -> str:
        """See CallFormat. Strings are free but for enumerations."""
        more = ' ("\\n" call)*' if several else ""
        rules = [
            f"start: call{more}",
            f"call: {' | '.join(f'call_{i}' for i in range(len(functions)))}",
            *text_rules(_PARAMETER_END, json.dumps(_PARAMETER_END), (_CLOSE, "<parameter=")),
        ]
        around = ('"<parameter={name}>\\n"', '"\\n</parameter>"', '"\\n"')
        for i, (name, schema) in enumerate(functions.items()):
            opening, closing = json.dumps(f"\n<function={name}>\n"), json.dumps("</function>\n")
            body, values = parameter_rules(i, schema, around)
            rules += [f"call_{i}: {mark(_OPEN)} {opening} {body} {closing} {mark(_CLOSE)}", *values]
        return "\n".join(rules)
