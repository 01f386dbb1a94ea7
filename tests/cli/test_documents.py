"""Every command line that the documentation and the help show has options that there are."""

from __future__ import annotations

import importlib
import re
import shlex
from pathlib import Path

import pytest
import typer

from entrollm.cli.main import app
from tests.support.paths import TINY_LLAMA

ROOT = TINY_LLAMA.parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")), ROOT / "examples" / "tiny-llama" / "README.md"]
_BLOCK = re.compile(r"```(?:bash|sh|console)\n(.*?)```", re.DOTALL)

# Variables may come before a command, and a prompt.
_COMMAND = re.compile(r"\s*(?:\$ )?(?:[A-Z_]+=\S* )*entrollm (.+)")


def commands_of(text: str) -> list[list[str]]:
    """The arguments of each `entrollm` in the blocks of a page."""
    found = []
    for block in _BLOCK.findall(text):
        for line in block.replace("\\\n", " ").splitlines():
            for part in re.split(r"&&|\||;", line):
                shown = _COMMAND.fullmatch(part)
                if shown is not None:
                    found.append(shlex.split(re.sub(r"[<>].*", "", shown[1]), comments=True))
    return found


def parse(arguments: list[str]) -> None:
    """Parse a command line without running it."""
    group = typer.main.get_command(app)
    if arguments[0].startswith("-"):
        return
    with group.make_context("entrollm", list(arguments)) as context:
        name, command, rest = group.resolve_command(context, list(arguments))  # type: ignore[attr-defined]
        assert command is not None
        with command.make_context(name, rest, parent=context):
            pass


def test_pages_show_commands() -> None:
    assert sum(len(commands_of(page.read_text(encoding="utf-8"))) for page in PAGES) > 30


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_of_pages_are_parsed(page: Path) -> None:
    for arguments in commands_of(page.read_text(encoding="utf-8")):
        if "-h" not in arguments and "--help" not in arguments:
            parse(arguments)


def test_examples_of_the_help_are_parsed() -> None:
    for command in app.registered_commands:
        examples = importlib.import_module(f"entrollm.cli.{command.name}").EXAMPLES
        text = "\n".join(line for line, _ in examples)
        for arguments in commands_of(f"```bash\n{text}\n```"):
            parse(arguments)
