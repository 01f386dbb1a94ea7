"""Wrong usage of the command line: reported as an object with --json; names that other tools give to options work."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

import typer
from typer.core import TyperGroup

from entrollm.cli.console import print_json_error

# What other tools, and earlier releases, call an option; all of them are accepted.
OTHER_NAMES = {
    "windows": "max-windows",
    "n-predict": "max-tokens",
    "num-predict": "max-tokens",
    "max-new-tokens": "max-tokens",
    "temp": "temperature",
    "repeat-penalty": "repetition-penalty",
    "system-prompt": "system",
    "out": "output",
    "output-dir": "output",
    "outfile": "output",
}
# typer brings its own copy of click's errors, or imports click's.
UsageError: type[Exception] = typer.BadParameter.__bases__[0]


def normalize_option(name: str) -> str:
    """The name of an option here, for one that may be written with underscores or be another tool's."""
    if len(name) == 1:
        return name
    name = name.replace("_", "-")
    return OTHER_NAMES.get(name, name)


class CommandGroup(TyperGroup):
    """The commands; with --json, usage errors are printed as an object too."""

    _given: Sequence[str] = ()

    def make_context(self, info_name: str | None, args: list[str], parent: Any = None, **extra: Any) -> Any:
        """Parse the arguments before the command."""
        self._given = list(args)
        with _reporting(self._given):
            return super().make_context(info_name, args, parent, **extra)

    def invoke(self, ctx: Any) -> Any:
        """Parse the arguments of the command and run it."""
        with _reporting(self._given):
            return super().invoke(ctx)


@contextlib.contextmanager
def _reporting(args: Sequence[str]) -> Iterator[None]:
    try:
        yield
    except UsageError as error:
        if _wants_json(args):
            text = error.format_message() if hasattr(error, "format_message") else str(error)
            print_json_error("UsageError", " ".join(text.split()))
        raise


def _wants_json(args: Sequence[str]) -> bool:
    """Whether standard output is to hold an object; `compare` takes a file with --json, and - for standard output."""
    if args and args[0] == "compare":
        return "--json=-" in args or ("--json", "-") in pairwise(args)
    return "--json" in args
