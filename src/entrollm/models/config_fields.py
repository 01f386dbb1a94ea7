"""Typed, checked access to a JSON object from a file that nobody has vetted."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import TypeGuard

from entrollm.errors import FormatError

# No dimension of a supported model comes near; it keeps absurd sizes from reaching an allocation.
MAX_SIZE = 2**24
# Scale factors in this range, and products of two of them, are safe in float32.
MIN_FACTOR, MAX_FACTOR = 1e-6, 1e12


class Fields:
    """A JSON object whose values are checked as they are read; null counts as absent, except to `has`.

    Args:
        values: the object.
        source: the file it came from, for messages.
    """

    def __init__(self, values: Mapping[str, object], source: str) -> None:
        self.source = source
        self._values = values

    def __contains__(self, key: str) -> bool:
        return self._values.get(key) is not None

    def has(self, key: str) -> bool:
        """Whether the key is there, even with null."""
        return key in self._values

    def keys(self) -> Iterable[str]:
        """The keys that are there."""
        return self._values.keys()

    def updated(self, other: Fields, source: str | None = None) -> Fields:
        """The object with the values of another one put over its own; null in the other one changes nothing.

        Args:
            other: the other one.
            source: for messages; by default that of the other one.
        """
        values = {key: value for key, value in other._values.items() if value is not None or key not in self._values}
        return Fields({**self._values, **values}, source or other.source)

    def only(self, *keys: str) -> Fields:
        """The object without other keys."""
        return Fields({key: self._values[key] for key in keys if key in self}, self.source)

    def without(self, *keys: str) -> Fields:
        """The object without some keys."""
        return Fields({key: value for key, value in self._values.items() if key not in keys}, self.source)

    def raw(self, key: str) -> object:
        """The value as it is, or None."""
        return self._values.get(key)

    def error(self, key: str, expected: str) -> FormatError:
        """The error to raise when `key` does not hold what was expected."""
        found = repr(self._values[key]) if key in self._values else "nothing"
        if len(found) > 80:
            found = f"{found[:77]}..."
        return FormatError(f"{self.source}: {key} should be {expected}, found {found}")

    def integer(self, key: str, default: int | None = None, *, low: int = 1, high: int = MAX_SIZE) -> int:
        """An integer in [low, high]; FormatError if it is not one, or is absent without a default."""
        value = self._values.get(key)
        if value is None and default is not None:
            return default
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise self.error(key, f"an integer from {low} to {high}")
        return value

    def integers(self, key: str, count: int, *, low: int = 0, high: int = MAX_SIZE) -> list[int]:
        """A list of `count` integers in [low, high]."""
        value = self._values.get(key)
        if isinstance(value, list) and len(value) == count:
            found = [item for item in value if type(item) is int and low <= item <= high]
            if len(found) == count:
                return found
        raise self.error(key, f"a list of {count} integers from {low} to {high}")

    def indices(self, key: str, stop: int) -> frozenset[int]:
        """A list of integers from 0; those from `stop` on mean nothing. Empty when absent."""
        value = self._values.get(key)
        items = [] if value is None else value
        if not isinstance(items, list) or not all(type(item) is int and item >= 0 for item in items):
            raise self.error(key, "a list of layers")
        return frozenset(item for item in items if item < stop)

    def optional_integer(
        self, key: str, default: int | None = None, *, low: int = 1, high: int = MAX_SIZE
    ) -> int | None:
        """An integer in [low, high]; the default when absent, None for null."""
        if not self.has(key):
            return default
        return self.integer(key, low=low, high=high) if key in self else None

    def number(self, key: str, default: float | None = None, *, low: float = 0.0, high: float = math.inf) -> float:
        """A finite number in [low, high]; FormatError if it is not one, or is absent without a default."""
        value = self._values.get(key)
        if value is None and default is not None:
            return default
        if not _is_number(value) or not low <= float(value) <= high:
            raise self.error(key, f"a finite number from {low:g} to {high:g}")
        return float(value)

    def factor(self, key: str, default: float | None = None) -> float:
        """A number in [MIN_FACTOR, MAX_FACTOR]; FormatError if it is not one, or is absent without a default."""
        return self.number(key, default, low=MIN_FACTOR, high=MAX_FACTOR)

    def factors(self, key: str, count: int) -> list[float]:
        """A list of `count` numbers in [MIN_FACTOR, MAX_FACTOR]."""
        value = self._values.get(key)
        if isinstance(value, list) and len(value) == count:
            numbers = [float(item) for item in value if _is_number(item) and MIN_FACTOR <= item <= MAX_FACTOR]
            if len(numbers) == count:
                return numbers
        raise self.error(key, f"a list of {count} numbers from {MIN_FACTOR:g} to {MAX_FACTOR:g}")

    def flag(self, key: str, default: bool) -> bool:
        """A boolean."""
        value = self._values.get(key)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self.error(key, "true or false")
        return value

    def text(self, key: str, default: str | None = None) -> str:
        """A string; FormatError if it is not one, or is absent without a default."""
        value = self._values.get(key)
        if value is None and default is not None:
            return default
        if not isinstance(value, str):
            raise self.error(key, "a string")
        return value

    def texts(self, key: str, count: int) -> list[str]:
        """A list of `count` strings."""
        value = self._values.get(key)
        if isinstance(value, list) and len(value) == count and all(isinstance(item, str) for item in value):
            return value
        raise self.error(key, f"a list of {count} strings")

    def token_ids(self, key: str, default: int | None = None) -> tuple[int, ...]:
        """Token ids written as one integer or a list of them; the default, or none, when absent, and none for null."""
        value = self._values.get(key, default)
        items = [] if value is None else value if isinstance(value, list) else [value]
        if not all(isinstance(item, int) and not isinstance(item, bool) and 0 <= item < MAX_SIZE for item in items):
            raise self.error(key, "a token id or a list of token ids")
        return tuple(items)

    def section(self, key: str) -> Fields:
        """A nested object; an empty one when absent."""
        value = self._values.get(key)
        if value is None:
            return Fields({}, f"{self.source}: {key}")
        if not isinstance(value, dict):
            raise self.error(key, "an object")
        return Fields(value, f"{self.source}: {key}")


def _is_number(value: object) -> TypeGuard[int | float]:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer beyond the range of float
        return False
