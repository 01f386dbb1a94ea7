"""The errors that EntroLLM raises, and messages that name options.

A library cannot know how its caller writes an option: `keep=['lm_head*']` in Python, `--keep 'lm_head*'` on the command
line. Messages therefore hold their options as `Option` objects. `str` writes them for Python; the command line writes
the same message with its flags.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Placeholder:
    """A value that the reader has to fill in, such as FILE."""

    name: str

    def __repr__(self) -> str:
        return self.name


@dataclass(frozen=True, slots=True)
class Option:
    """An option of the Python API that a message names.

    Attributes:
        name: as in `CompressOptions`, `EntroConfig` or the function that takes it.
        value: the value that the message suggests or reports; `None` to name the option alone.
    """

    name: str
    value: object = None

    def __str__(self) -> str:
        return self.name if self.value is None else f"{self.name}={self.value!r}"


class Message:
    """A sentence that names options.

    Args:
        template: a format string.
        parts: what it formats, in order; options in them, and in messages among them, are written as the reader knows
            them.
    """

    def __init__(self, template: str, *parts: object) -> None:
        self._template = template
        self._parts = parts

    def write(self, spell: Callable[[Option], str]) -> str:
        """The sentence, with each option written by `spell`."""
        return self._template.format(*(_written(part, spell) for part in self._parts))

    def __str__(self) -> str:
        return self.write(str)


def _written(part: object, spell: Callable[[Option], str]) -> object:
    if isinstance(part, Message):
        return part.write(spell)
    return spell(part) if isinstance(part, Option) else part


class EntroLLMError(Exception):
    """Base of every error that names a bad file, tensor or option.

    Args:
        message: what was expected and what was found.
        hint: what to do about it; it follows the message after a semicolon.
    """

    def __init__(self, message: str | Message = "", *, hint: Message | None = None) -> None:
        self.message = message
        self.hint = hint
        super().__init__(self.describe(str))

    def describe(self, spell: Callable[[Option], str]) -> str:
        """The message and the hint, with each option written by `spell`."""
        parts = (self.message, self.hint)
        return "; ".join(part.write(spell) if isinstance(part, Message) else part for part in parts if part)


class FormatError(EntroLLMError):
    """A file's structure is wrong: a missing shard, a bad header, an impossible shape."""


class CorruptStreamError(FormatError):
    """The structure is right but the coded bytes are not: a checksum or a stream end does not match."""


class UnsupportedError(EntroLLMError):
    """The input is valid, but it uses something that EntroLLM does not implement."""


class OptionError(EntroLLMError, ValueError):
    """An option has a value that it cannot have, or does not go with another one."""
