"""Calls as Llama 3 models write them: an answer of JSON objects, perhaps behind <|python_tag|>."""

from __future__ import annotations

import json

from entrollm.serve.output.blocks import BlockFormat, Brackets, End
from entrollm.serve.output.items import Functions, Mark, ToolCall, arguments_rule, call_of, parse_json

_TAG = "<|python_tag|>"


class Llama(BlockFormat):
    """See CallFormat and BlockFormat."""

    name = "llama"
    marks = (_TAG,)
    openings = (_TAG,)
    first = "{"
    separators = " \n\t\r;"

    def end(self, opening: str) -> End:
        """See BlockFormat."""
        return Brackets('"')

    def calls(self, block: str, functions: Functions) -> list[ToolCall] | None:
        """See BlockFormat."""
        call = call_of(parse_json(block.removeprefix(_TAG)), functions, ("parameters", "arguments"))
        return None if call is None else [call]

    def grammar(self, functions: Functions, mark: Mark, *, several: bool) -> str:
        """See CallFormat."""
        more = ' ("; " call)*' if several else ""
        rules = [f"start: call{more}", f"call: {' | '.join(f'call_{i}' for i in range(len(functions)))}"]
        for i, (name, schema) in enumerate(functions.items()):
            opening = json.dumps(f'{{"name": {json.dumps(name)}, "parameters": ')
            rules += [f'call_{i}: {opening} arguments_{i} "}}"', arguments_rule(f"arguments_{i}", schema)]
        return "\n".join(rules)
