"""Calls as Hermes and Qwen models write them: JSON between <tool_call> and </tool_call>."""

from __future__ import annotations

import json

from entrollm.serve.output.blocks import BlockFormat, End, Marker
from entrollm.serve.output.items import Functions, Mark, ToolCall, arguments_rule, call_of, parse_json

_OPEN, _CLOSE = "<tool_call>", "</tool_call>"


class Hermes(BlockFormat):
    """See CallFormat and BlockFormat."""

    name = "hermes"
    marks = (_OPEN, _CLOSE)
    openings = (_OPEN,)

    def end(self, opening: str) -> End:
        """See BlockFormat."""
        return Marker(_CLOSE)

    def calls(self, block: str, functions: Functions) -> list[ToolCall] | None:
        """See BlockFormat."""
        call = call_of(parse_json(block.removeprefix(_OPEN).removesuffix(_CLOSE)), functions)
        return None if call is None else [call]

    def grammar(self, functions: Functions, mark: Mark, *, several: bool) -> str:
        """See CallFormat."""
        more = ' ("\\n" call)*' if several else ""
        rules = [f"start: call{more}", f"call: {' | '.join(f'call_{i}' for i in range(len(functions)))}"]
        for i, (name, schema) in enumerate(functions.items()):
            opening = json.dumps(f'\n{{"name": {json.dumps(name)}, "arguments": ')
            closing = json.dumps("}\n")
            rules.append(f"call_{i}: {mark(_OPEN)} {opening} arguments_{i} {closing} {mark(_CLOSE)}")
            rules.append(arguments_rule(f"arguments_{i}", schema))
        return "\n".join(rules)
