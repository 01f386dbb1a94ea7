"""The texts that quality is measured on: files, and excerpts of Python's standard library as a text of source code."""

from __future__ import annotations

import platform
import sysconfig
from dataclasses import dataclass
from pathlib import Path

from entrollm.evaluate import read_text

STDLIB = "stdlib"
"""The file name that stands for excerpts of the running Python's standard library."""

_FILES = (
    "argparse.py",
    "tarfile.py",
    "json/decoder.py",
    "difflib.py",
    "http/client.py",
    "dataclasses.py",
    "heapq.py",
    "logging/handlers.py",
    "urllib/parse.py",
    "statistics.py",
    "shutil.py",
    "xml/etree/ElementTree.py",
    "threading.py",
    "csv.py",
    "fractions.py",
    "subprocess.py",
    "configparser.py",
    "tempfile.py",
    "inspect.py",
    "textwrap.py",
    "typing.py",
    "uuid.py",
    "smtplib.py",
    "ast.py",
)
# Characters of an excerpt: about one window of 512 tokens, so that windows come from different files.
_EXCERPT = 2000


@dataclass(frozen=True)
class Text:
    """A text to measure on.

    Attributes:
        name: by which results refer to it.
        source: what it is, for people who want the same one.
        content: the text itself.
    """

    name: str
    source: str
    content: str


def open_text(argument: str) -> Text:
    """The text that `NAME=FILE`, `FILE` or `NAME=stdlib` stands for.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is not UTF-8.
    """
    name, _, file = argument.rpartition("=")
    if file == STDLIB:
        return Text(name or STDLIB, f"Python {platform.python_version()}'s standard library", _standard_library())
    return Text(name or Path(file).stem, Path(file).name, read_text(file))


def _standard_library() -> str:
    """Whole lines from the middle of each file; the beginnings are mostly prose."""
    folder = Path(sysconfig.get_path("stdlib"))
    excerpts = []
    for file in _FILES:
        lines = read_text(folder / file).splitlines(keepends=True)
        excerpt = ""
        for line in lines[len(lines) // 2 :]:
            if len(excerpt) + len(line) > _EXCERPT:
                break
            excerpt += line
        excerpts.append(excerpt)
    return "\n".join(excerpts)
