"""What a target of a campaign is."""

from __future__ import annotations

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


def mutated(value: Json, generator: random.Random) -> bytes:
    """Mostly a mutated value, now and then damaged text."""
    if generator.randrange(5):
        return to_text(mutate_json(value, generator))
    return mutate_text(to_text(value), generator)
