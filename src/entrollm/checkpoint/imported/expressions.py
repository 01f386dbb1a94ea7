"""Regular expressions that a checkpoint has for names of layers.

Python's expressions can take time that doubles with each character of a name. They come from strangers, so they are
tried in a process with a limit.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Sequence

from entrollm.errors import FormatError

TIME_LIMIT_S = 5.0
_PROGRAM = """
import json, re, sys
expressions, names = json.load(sys.stdin)
patterns = [re.compile(each) for each in expressions]
print(json.dumps([next((i for i, each in enumerate(patterns) if each.match(name)), None) for name in names]))
"""


def check_expression(expression: str, place: str) -> None:
    """Check that an expression is valid.

    Args:
        expression: for names of layers.
        place: where quantization_config has it, for errors.
    Raises:
        FormatError: it is not.
    """
    try:
        re.compile(expression)
    except (re.error, OverflowError, RecursionError) as error:
        raise FormatError(
            f"config.json: {place} of quantization_config: expected a regular expression for names of layers, found an "
            f"error: {error}; correct it"
        ) from None


def first_matches(expressions: Sequence[str], names: Sequence[str]) -> list[int | None]:
    """For each name, the number of the first expression that matches its beginning; None if none does.

    Args:
        expressions: valid ones.
        names: of layers.
    Raises:
        FormatError: it takes too long.
    """
    if not expressions or not names:
        return [None] * len(names)
    try:
        ended = subprocess.run(
            [sys.executable, "-I", "-c", _PROGRAM],
            input=json.dumps([expressions, names]),
            capture_output=True,
            encoding="utf-8",
            timeout=TIME_LIMIT_S,
            check=True,
        )
    except (subprocess.TimeoutExpired, subprocess.CalledProcessError):
        shown = ", ".join(repr(each) for each in expressions[:4])
        raise FormatError(
            f"config.json: the regular expressions of quantization_config take more than {TIME_LIMIT_S:g} seconds on "
            f"the names of {len(names)} layers: {shown:.300}; write simpler ones"
        ) from None
    found: list[int | None] = json.loads(ended.stdout)
    return found
