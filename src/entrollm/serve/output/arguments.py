"""Arguments that models write as plain text, each between tags of its own, as schemas tell what they are."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from entrollm.serve.output.items import parse_json

# The types of JSON schemas, by those of Python.
_TYPES = {str: "string", bool: "boolean", int: "integer", float: "number", dict: "object", list: "array"}


def properties_of(schema: Mapping[str, Any]) -> Mapping[str, object]:
    """The schemas of a function's arguments, by name; clients may write anything in their place."""
    properties = schema.get("properties")
    return properties if isinstance(properties, dict) else {}


def value_of(text: str, schema: object) -> object:
    """What a text stands for: itself where the schema takes strings and nothing better, else what it is as JSON."""
    kinds, options = _kinds(schema)
    if text in options or kinds == {"string"}:
        return text
    value = parse_json(text)
    if value is None:
        is_null = text.strip() == "null" and ("null" in kinds or not kinds)
        return None if is_null else text
    kind = _TYPES[type(value)]
    fits = not kinds or kind in kinds or (kind == "integer" and "number" in kinds)
    return value if fits or "string" not in kinds else text


def text_rules(closing: str, written: str, others: Sequence[str]) -> list[str]:
    """Rules of a Lark grammar, of which `text` stands for a text that may be any, and its closing tag.

    Args:
        closing: the tag.
        written: the tag as the grammar writes it, a special token or text.
        others: what else the text must not hold, at least one.
    """
    is_token = written.startswith("<[")
    kept_out = "|".join(re.escape(tag).replace("/", r"\/") for tag in ((closing, *others) if is_token else others))
    # Text that closes a text is found as a suffix: the longest match would take it for a part of the text.
    rule = f"text: TEXT {written}" if is_token else f"text[suffix={json.dumps(closing)}]: TEXT"
    return [rule, rf"TEXT: /(.|\n)*/ & ~/(.|\n)*({kept_out})(.|\n)*/"]


def parameter_rules(function: int, schema: Mapping[str, Any], around: tuple[str, str, str]) -> tuple[str, list[str]]:
    """The part of a Lark grammar that stands for the arguments of a function, each at most once and in order.

    Args:
        function: its number, which makes the names of rules unique.
        schema: of the arguments.
        around: what stands before a value, closes it, and stands behind that, with {name} in place of the parameter's
            name. The rule `text` closes itself; see text_rules.
    Returns:
        The body of a rule, often "", and the rules that it names besides `text`.
    """
    wanted = schema.get("required")
    required = wanted if isinstance(wanted, list) else []
    definitions = {key: schema[key] for key in ("$defs", "definitions") if key in schema}
    parts, rules = [], []
    for i, (name, kind) in enumerate(properties_of(schema).items()):
        kinds, options = _kinds(kind)
        rule = f"value_{function}_{i}"
        before, closing, behind = (part.replace("{name}", json.dumps(name)[1:-1]) for part in around)
        if options:
            rules.append(f"{rule}: {' | '.join(json.dumps(option) for option in options)}")
        elif kinds == {"string"}:
            rule, closing = "text", ""
        else:
            inner = kind if isinstance(kind, dict) else {}
            compact = json.dumps({**definitions, **inner, "x-guidance": {"whitespace_flexible": False}})
            rules.append(f"{rule}: %json {compact}")
        part = f"{before} {rule} {closing} {behind}"
        parts.append(part if name in required else f"({part})?")
    return " ".join(parts), rules


def _kinds(schema: object) -> tuple[set[str], list[str]]:
    """The types of values that a schema takes, empty if it does not say, and the strings if it lists them."""
    if not isinstance(schema, dict):
        return set(), []
    options = schema.get("enum")
    if isinstance(options, list) and options and all(isinstance(option, str) for option in options):
        return {"string"}, options
    found = schema.get("type")
    listed = found if isinstance(found, list) else [found]
    kinds = {kind for kind in listed if isinstance(kind, str)}
    for key in ("anyOf", "oneOf"):
        for each in schema[key] if isinstance(schema.get(key), list) else ():
            kinds |= _kinds(each)[0]
    return kinds, []
