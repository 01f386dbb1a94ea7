"""What the troubleshooting page quotes is what the product says."""

from __future__ import annotations

import ast
import errno
import os
import re
from pathlib import Path

import pytest

import entrollm
from tests.support.paths import TINY_LLAMA

PAGE = TINY_LLAMA.parent.parent / "docs" / "guide" / "troubleshooting.md"
# What others say: transformers, the system and its shell.
OTHERS = ("Unknown quantization type, got entrollm", os.strerror(errno.ENOSPC), "Bus error")


def quotes() -> list[str]:
    """The messages in the bold beginnings of paragraphs."""
    joined = re.sub(r"(?<!\n)\n(?!\n)", " ", PAGE.read_text(encoding="utf-8"))
    bold = re.findall(r"^\*\*(.+?)\*\*", joined, re.MULTILINE)
    return [quote for text in bold for quote in re.findall(r'"([^"]+)"', text) if quote not in OTHERS]


@pytest.fixture(scope="module")
def literals() -> str:
    """All strings of the source, one a line; whatever is filled in is left out."""
    found = []
    for file in sorted(Path(entrollm.__file__).parent.rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                parts = [str(part.value) if isinstance(part, ast.Constant) else "\0" for part in node.values]
                found.append("".join(parts))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value.replace("{}", "\0"))
    return "\n".join(text.replace("\n", " ") for text in found)


def test_the_page_quotes_messages() -> None:
    assert len(quotes()) > 25


@pytest.mark.parametrize("quote", quotes())
def test_quoted_messages_are_in_the_source(quote: str, literals: str) -> None:
    """Dots in a quote stand for anything that the message fills in or says besides."""
    parts = [re.escape(part.strip()) for part in quote.split("...")]
    assert re.search(".*".join(parts), literals), f"no message reads {quote!r}"
