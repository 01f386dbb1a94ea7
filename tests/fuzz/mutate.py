"""Mutations of JSON values and of bytes, which keep enough structure to come past the first check."""

from __future__ import annotations

import copy
import json
import math
import random
from typing import Any

Json = Any

_NUMBERS = (0, -1, 1, 2, 3, 7, 255, 256, 2**31 - 1, 2**31, 2**32, 2**53, 2**63 - 1, 2**63, 2**64, 10**30, -(2**63))
_FLOATS = (0.0, -0.0, 0.5, -1.5, 1e-300, 5e-324, 1e308, math.inf, -math.inf, math.nan)
_TEXTS = ("", "x", "weight", "\0", "\ud800", "é" * 40, "../x", "{0}", "%s", "a" * 3000, "1", "true", "F32", "I64", "U8")
_OTHERS: tuple[Json, ...] = (None, True, False, [], {}, [[]], [None], {"": None}, [0] * 300, [[[[[[]]]]]])


def mutate_json(value: Json, generator: random.Random) -> Json:
    """A copy of a value with a few changes somewhere inside."""
    value = copy.deepcopy(value)
    for _ in range(generator.choice((1, 1, 1, 2, 3, 6))):
        places = list(_places(value))
        if not places:
            return random_json(generator)
        _change(*generator.choice(places), generator, places)
    return value


def random_json(generator: random.Random) -> Json:
    """A value of any type, with a liking for the ends of ranges."""
    pool = generator.choice((_NUMBERS, _FLOATS, _TEXTS, _OTHERS))
    return copy.deepcopy(generator.choice(pool))


def mutate_text(text: bytes, generator: random.Random) -> bytes:
    """Damage that no JSON writer makes: cuts, flipped bits, doubled and inserted pieces, nesting."""
    data = bytearray(text)
    kind = generator.randrange(7)
    at = generator.randrange(len(data) + 1)
    if kind == 0:
        del data[at:]
    elif kind == 1 and data:
        data[at % len(data)] ^= 1 << generator.randrange(8)
    elif kind == 2:
        end = min(len(data), at + generator.randrange(1, 64))
        data[at:at] = data[at:end] * generator.choice((1, 2, 50))
    elif kind == 3:
        piece = (
            b"\xff\xfe",
            b"\xef\xbb\xbf",
            b"\0",
            b"Infinity",
            b"1e999",
            b"9" * 5000,
            b'"\\ud800"',
            b'{"a":1,"a":2}',
        )
        data[at:at] = generator.choice(piece)
    elif kind == 4:
        depth = generator.choice((10, 1000, 100_000))
        data[at:at] = generator.choice((b"[", b'{"a":')) * depth
    elif kind == 5:
        del data[at : at + generator.randrange(1, 32)]
    else:
        data[at : at + 8] = generator.randrange(2**64).to_bytes(8, "little")
    return bytes(data)


def to_text(value: Json) -> bytes:
    """JSON as files hold it; lone surrogates become escapes."""
    return json.dumps(value).encode()


def _places(value: Json) -> list[tuple[Json, Any]]:
    """Every (container, key) inside a value."""
    found: list[tuple[Json, Any]] = []
    stack = [value]
    while stack:
        container = stack.pop()
        if isinstance(container, dict):
            keys: Any = list(container)
        elif isinstance(container, list):
            keys = range(len(container))
        else:
            continue
        for key in keys:
            found.append((container, key))
            stack.append(container[key])
    return found


def _change(container: Json, key: Any, generator: random.Random, places: list[tuple[Json, Any]]) -> None:
    if isinstance(container, list) and not -len(container) <= key < len(container):
        return  # an earlier change has shortened it
    if isinstance(container, dict) and key not in container:
        return
    kind = generator.randrange(8)
    if kind <= 2:
        container[key] = _near(container[key], generator)
    elif kind == 3:
        container[key] = random_json(generator)
    elif kind == 4:
        del container[key]
    elif kind == 5:
        other, place = generator.choice(places)
        if isinstance(other, dict) and place in other:
            container[key] = copy.deepcopy(other[place])
    elif kind == 6 and isinstance(container, dict):
        container[generator.choice((str(key) + "x", *_TEXTS))] = container[key]
    elif kind == 7:
        container[key] = [copy.deepcopy(container[key])]


def _near(value: Json, generator: random.Random) -> Json:
    """A value of the same type that differs a little."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return generator.choice((value + 1, value - 1, 2 * value, -value, value // 2, float(value), str(value)))
    if isinstance(value, float):
        return generator.choice((value * 2, -value, int(value) if math.isfinite(value) else 0, value * 1e30))
    if isinstance(value, str):
        at = generator.randrange(len(value) + 1)
        letter = chr(generator.choice((32, 46, 48, 57, 97, 0x3B1, 0xD800, 0x1F600)))
        return generator.choice((value[:at], value[at:], value[:at] + letter + value[at:], value * 2, value.upper()))
    if isinstance(value, list):
        return generator.choice((value[1:], value + value, value[::-1], value[:1]))
    return random_json(generator)
