"""Calls as some Llama 3 and all Llama 4 models write them: an answer that is a Python list of calls."""

from __future__ import annotations

import ast
import json
import warnings
from collections.abc import Collection, Mapping
from typing import Any

from entrollm.serve.errors import bad_request
from entrollm.serve.output.blocks import BlockFormat, Brackets, End
from entrollm.serve.output.items import Functions, Mark, ToolCall, arguments_rule, dump

_START, _END = "<|python_start|>", "<|python_end|>"
# Python's parser takes hundreds of bytes for each character of hostile text.
_MOST_CHARACTERS = 64 << 10
_NAMES = {"true": True, "false": False, "null": None}


class Pythonic(BlockFormat):
    """See CallFormat and BlockFormat."""

    name = "pythonic"
    marks = (_START, _END)
    openings = (_START, _END)
    first = "["

    def end(self, opening: str) -> End:
        """See BlockFormat."""
        return _Nothing() if opening == _END else Brackets("\"'")

    def calls(self, block: str, functions: Functions) -> list[ToolCall] | None:
        """See BlockFormat."""
        if block == _END:
            return []
        text = block.removeprefix(_START).strip()
        if len(text) > _MOST_CHARACTERS:
            return None
        try:
            with warnings.catch_warnings(action="ignore"):  # of escapes that Python does not know
                tree = ast.parse(text, mode="eval").body
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            return None
        if not isinstance(tree, ast.List) or not tree.elts:
            return None
        calls = [_call(element, functions) for element in tree.elts]
        known = [call for call in calls if call is not None]
        return known if len(known) == len(calls) else None

    def grammar(self, functions: Functions, mark: Mark, *, several: bool) -> str:
        """See CallFormat.

        Raises:
            ApiError: a schema does not list the properties of an object.
        """
        more = ' (", " call)*' if several else ""
        rules = [f'start: "[" call{more} "]"', f"call: {' | '.join(f'call_{i}' for i in range(len(functions)))}"]
        for i, (name, schema) in enumerate(functions.items()):
            rules += _call_rules(f"call_{i}", name, schema)
        return "\n".join(rules)


class _Nothing:
    """The end of a marker without anything behind it."""

    def feed(self, text: str) -> int | None:
        return len(_END)


def _call(element: ast.expr, names: Collection[str]) -> ToolCall | None:
    prefix = ""
    if isinstance(element, ast.BinOp) and isinstance(element.op, ast.Sub):
        # The name has a dash, which Python reads as an operator.
        try:
            prefix, element = ast.unparse(element.left).replace(" ", "") + "-", element.right
        except RecursionError:
            return None
    if not isinstance(element, ast.Call) or element.args:
        return None
    try:
        name = prefix + ast.unparse(element.func)
    except RecursionError:
        return None
    if name not in names:
        return None
    arguments = {}
    for keyword in element.keywords:
        if keyword.arg is None:
            return None
        try:
            arguments[keyword.arg] = _value(keyword.value)
        except (ValueError, RecursionError):
            return None
    text = dump(arguments)
    return None if text is None else ToolCall(name, text)


def _value(node: ast.expr) -> object:
    """The value of a literal; words of JSON count as literals.

    Raises:
        ValueError: it is not one that JSON knows.
    """
    if isinstance(node, ast.Constant) and isinstance(node.value, (str, int, float, bool, type(None))):
        return node.value
    if isinstance(node, ast.Name) and node.id in _NAMES:
        return _NAMES[node.id]
    if isinstance(node, (ast.List, ast.Tuple)):
        return [_value(element) for element in node.elts]
    if isinstance(node, ast.Dict):
        found = {}
        for key, value in zip(node.keys, node.values, strict=True):
            if not (isinstance(key, ast.Constant) and isinstance(key.value, str)):
                raise ValueError
            found[key.value] = _value(value)
        return found
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, (ast.USub, ast.UAdd)):
        number = _value(node.operand)
        if isinstance(number, (int, float)) and not isinstance(number, bool):
            return -number if isinstance(node.op, ast.USub) else number
    raise ValueError


def _call_rules(rule: str, name: str, schema: Mapping[str, Any]) -> list[str]:
    """Rules of a call with keyword arguments, the required ones first."""
    properties = schema.get("properties", {})
    required = schema.get("required", [])
    is_plain = isinstance(properties, dict) and isinstance(required, list)
    if not is_plain or not all(key.isidentifier() for key in properties) or not set(required) <= set(properties):
        raise bad_request(f"tools: the parameters of {name} should be an object with named properties", "tools")
    rest = {key: schema[key] for key in ("$defs", "definitions") if key in schema}
    rules, terms = [], {}
    for i, (key, value) in enumerate(properties.items()):
        terms[key] = f"{rule}_{i}"
        opening = json.dumps(f"{key}=")
        rules.append(f"{rule}_{i}: {opening} {rule}_{i}_value")
        # A schema may be `true`, which allows anything.
        rules.append(arguments_rule(f"{rule}_{i}_value", {**(value if isinstance(value, dict) else {}), **rest}))
    first = [terms[key] for key in properties if key in required]
    optional = [terms[key] for key in properties if key not in required]
    if first:
        bodies = [' ", " '.join(first) + "".join(f' (", " {term})?' for term in optional)]
    else:
        bodies = ['""']
        for i, term in enumerate(optional):
            bodies.append(term + "".join(f' (", " {later})?' for later in optional[i + 1 :]))
    rules.append(f"{rule}_arguments: {' | '.join(bodies)}")
    return [f'{rule}: {json.dumps(f"{name}(")} {rule}_arguments ")"', *rules]
