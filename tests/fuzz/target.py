"""What a target of a campaign is."""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.fuzz.mutate import Json, mutate_json, mutate_text, to_text


@dataclass(frozen=True)
class Target:
    """A parser.

    Attributes:
        prepare: writes what is not mutated into a folder; returns the seeds of mutations.
        mutate: writes a mutation of a seed into the folder.
        read: reads the folder as the product does; it may raise the errors that the product reports.
    """

    prepare: Callable[[Path], list[Any]]
    mutate: Callable[[Path, Any, random.Random], None]
    read: Callable[[Path], object]


def write(path: Path, content: bytes) -> None:
    """Write a file as `path.write_bytes` does, but over its old content, which takes half the time."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT, 0o600)
    try:
        written = os.write(descriptor, content)
        os.ftruncate(descriptor, written)
    finally:
        os.close(descriptor)
    assert written == len(content)


class Files:
    """Files of a folder, some of which change from one input to the next; the others are not written again."""

    def __init__(self) -> None:
        self._texts: dict[int, tuple[Json, bytes]] = {}
        self._written: dict[Path, bytes] = {}

    def text(self, value: Json) -> bytes:
        """A value that is never changed as JSON."""
        found = self._texts.get(id(value))
        if found is None:
            found = self._texts[id(value)] = value, to_text(value)  # keeps the value, and so its id
        return found[1]

    def write(self, path: Path, content: bytes) -> None:
        """Let a file have this content."""
        if self._written.get(path) is not content:
            write(path, content)
            self._written[path] = content

    def remove(self, path: Path) -> None:
        """Let there be no such file."""
        path.unlink(missing_ok=True)
        self._written.pop(path, None)


def mutated(value: Json, generator: random.Random) -> bytes:
    """Mostly a mutated value, now and then damaged text."""
    if generator.randrange(5):
        return to_text(mutate_json(value, generator))
    return mutate_text(to_text(value), generator)
