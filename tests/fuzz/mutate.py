"""Mutations of JSON values and of bytes, which keep enough structure to come past the first check."""

from __future__ import annotations

import json
import math
import pickle
import random
from typing import Any

Json = Any

_NUMBERS = (0, -1, 1, 2, 3, 7, 255, 256, 2**31 - 1, 2**31, 2**32, 2**53, 2**63 - 1, 2**63, 2**64, 10**30, -(2**63))
_FLOATS = (0.0, -0.0, 0.5, -1.5, 1e-300, 5e-324, 1e308, math.inf, -math.inf, math.nan)
_TEXTS = ("", "x", "weight", "\0", "\ud800", "é" * 40, "../x", "{0}", "%s", "a" * 3000, "1", "true", "F32", "I64", "U8")
_MOST_KNOWN = 400
_OTHERS: tuple[Json, ...] = (None, True, False, [], {}, [[]], [None], {"": None}, [0] * 300, [[[[[[]]]]]])


def mutate_json(value: Json, generator: random.Random) -> Json:
    """A copy of a value with a few changes somewhere inside; every list and object is as likely as a large one.

    The value itself must never change, because copies of it are made from what it was at first.
    """
    value, containers = _KNOWN.copy(value)
    if not containers:
        return random_json(generator)
    for _ in range(generator.choice((1, 1, 1, 2, 3, 6))):
        container = generator.choice(containers)
        if container:  # an earlier change may have emptied it
            _change(container, _any_key(container, generator), generator, containers)
    return value


def random_json(generator: random.Random) -> Json:
    """A value of any type, with a liking for the ends of ranges."""
    pool = generator.choice((_NUMBERS, _FLOATS, _TEXTS, _OTHERS))
    return _copy(generator.choice(pool))


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


def _copy(value: Json) -> Json:
    """A deep copy, ten times as fast as `copy.deepcopy`."""
    return pickle.loads(pickle.dumps(value, -1))


def _containers(value: Json) -> list[Any]:
    """The lists and objects in a value that are not empty, itself included."""
    found = []
    stack = [value]
    while stack:
        container = stack.pop()
        if container and isinstance(container, dict | list):
            found.append(container)
            items = container.values() if isinstance(container, dict) else container
            stack.extend([item for item in items if isinstance(item, dict | list)])
    return found


def _any_key(container: Any, generator: random.Random) -> Any:
    return generator.choice(list(container)) if isinstance(container, dict) else generator.randrange(len(container))


def _change(container: Any, key: Any, generator: random.Random, containers: list[Any]) -> None:
    kind = generator.randrange(8)
    if kind <= 2:
        container[key] = _near(container[key], generator)
    elif kind == 3:
        container[key] = random_json(generator)
    elif kind == 4:
        del container[key]
    elif kind == 5:
        other = generator.choice(containers)
        if other:
            container[key] = _copy(other[_any_key(other, generator)])
    elif kind == 6 and isinstance(container, dict):
        container[generator.choice((str(key) + "x", *_TEXTS))] = container[key]
    elif kind == 7:
        container[key] = [_copy(container[key])]


def _near(value: Json, generator: random.Random) -> Json:
    """A value of the same type that differs a little."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        as_float = float(value) if abs(value) < 2**1000 else math.inf
        return generator.choice((value + 1, value - 1, 2 * value, -value, value // 2, as_float, str(value)))
    if isinstance(value, float):
        return generator.choice((value * 2, -value, int(value) if math.isfinite(value) else 0, value * 1e30))
    if isinstance(value, str):
        at = generator.randrange(len(value) + 1)
        letter = chr(generator.choice((32, 46, 48, 57, 97, 0x3B1, 0xD800, 0x1F600)))
        return generator.choice((value[:at], value[at:], value[:at] + letter + value[at:], value * 2, value.upper()))
    if isinstance(value, list):
        return generator.choice((value[1:], value + value, value[::-1], value[:1]))
    return random_json(generator)


class _Known:
    """Values that were copied lately, as they were pickled together with the list of their containers."""

    def __init__(self) -> None:
        self._pickled: dict[int, tuple[Json, bytes]] = {}

    def copy(self, value: Json) -> tuple[Json, list[Any]]:
        """A copy of a value that never changes, and the containers in it."""
        found = self._pickled.get(id(value))
        if found is None:
            if len(self._pickled) == _MOST_KNOWN:
                self._pickled.clear()
            found = value, pickle.dumps((value, _containers(value)), -1)  # keeps the value, and so its id
            self._pickled[id(value)] = found
        copied: tuple[Json, list[Any]] = pickle.loads(found[1])
        return copied


_KNOWN = _Known()
