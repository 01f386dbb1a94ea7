"""Strict access to the fields of a JSON object, with errors that name the tensor and the field."""

from __future__ import annotations

import json
from collections.abc import Mapping, Set
from typing import Any

from entrollm.errors import FormatError

FLOAT32_MAX = 3.4028234663852886e38
_MAX_TEXT = 64


class JsonFields:
    """The fields of one object of a stored spec.

    Args:
        name: the tensor and its file, for errors.
        fields: the object.
    """

    def __init__(self, name: str, fields: Mapping[str, Any]) -> None:
        self.name = name
        self._fields = fields

    @classmethod
    def parse(cls, text: str, name: str) -> JsonFields:
        """Parse a JSON object that has no duplicate keys and no NaN.

        Raises:
            FormatError: the text is not such an object.
        """
        try:
            fields = json.loads(text, object_pairs_hook=_refuse_duplicates, parse_constant=_refuse_constant)
        except (ValueError, RecursionError) as error:
            raise FormatError(f"{name}: the stored spec is not valid JSON: {error}") from None
        if not isinstance(fields, dict):
            raise FormatError(f"{name}: the stored spec is not a JSON object")
        return cls(name, fields)

    def __contains__(self, key: str) -> bool:
        return key in self._fields

    def error(self, message: str) -> FormatError:
        """An error that names the tensor."""
        return FormatError(f"{self.name}: {message}")

    def refuse_unknown(self, known: Set[str]) -> None:
        """Raise FormatError if a key is not in `known`."""
        if unknown := sorted(self._fields.keys() - known):
            raise self.error(f"the stored spec has the unknown key {unknown[0]!r:.80}")

    def get(self, key: str, default: Any = None) -> Any:
        """The unchecked value, or `default` if absent."""
        return self._fields.get(key, default)

    def require(self, key: str) -> Any:
        """The unchecked value.

        Raises:
            FormatError: the key is absent.
        """
        if key not in self._fields:
            raise self.error(f"the stored spec lacks {key!r}")
        return self._fields[key]

    def text(self, key: str) -> str:
        """A string of at most 64 characters."""
        value = self.require(key)
        if not isinstance(value, str) or len(value) > _MAX_TEXT:
            raise self.error(f"{key} must be a short string, found {value!r:.80}")
        return value

    def int_pair(self, key: str, limit: int) -> tuple[int, int]:
        """Two integers from 1 to `limit`."""
        value = self.require(key)
        if not isinstance(value, list) or len(value) != 2 or not all(is_int(v, 1, limit) for v in value):
            raise self.error(f"{key} must be two integers from 1 to {limit}, found {value!r:.80}")
        return value[0], value[1]

    def number(self, key: str) -> float | None:
        """A number in the range of float32; None if absent."""
        value = self._fields.get(key)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= FLOAT32_MAX:
            raise self.error(f"{key} must be a finite float32, found {value!r:.80}")
        return float(value)

    def zero(self) -> float | None:
        """The symbol that stands for weight 0, possibly between two symbols; None if absent."""
        value = self._fields.get("zero")
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 255:
            raise self.error(f"zero must be 0 to 255, found {value!r:.80}")
        return value


def is_int(value: Any, low: int, high: int) -> bool:
    """Whether a JSON value is an integer from `low` to `high`, and not a boolean."""
    return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high


def whole_or_float(value: float) -> int | float:
    """A number as an integer if it is whole, which makes the shorter JSON."""
    return int(value) if value == int(value) else value


def _refuse_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(dict(pairs)) != len(pairs):
        raise ValueError("an object has a key twice")
    return dict(pairs)


def _refuse_constant(constant: str) -> Any:
    raise ValueError(f"{constant} is not JSON")
