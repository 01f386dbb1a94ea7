"""The program that renders a chat template, in a process of its own with little memory; started by `chat.py`.

A template comes with a model, so it may take any time and memory. The program reads JSON lines and answers each with
one: first {"path": sys.path, "template": source, "memory_bytes": limit}, before it compiles the template, then the
names of each rendering.
"""

from __future__ import annotations

import contextlib
import json
import signal
import sys
from collections.abc import Callable, Mapping
from datetime import datetime
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jinja2 import nodes
    from jinja2.parser import Parser

# A prompt of a million tokens has fewer characters.
_MAX_CHARACTERS = 1 << 26


class _RefusalError(Exception):
    """The template called raise_exception: the messages are not what it expects."""


def main() -> None:
    """Answer requests until the input ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that asks
    first = json.loads(sys.stdin.readline())
    sys.path[:] = first["path"]
    render, invalid = None, ""
    compile_template = _compiler()
    _limit_memory(first["memory_bytes"])
    _answer({})
    # Whatever a template raises is an answer: syntax and memory errors too.
    try:
        render = compile_template(first["template"])
    except Exception as error:
        invalid = _describe(error)
    for line in sys.stdin:
        if render is None:
            _answer({"invalid": invalid})
            continue
        try:
            text = render(json.loads(line))
            if len(text) > _MAX_CHARACTERS:
                raise ValueError(f"it made {len(text)} characters, at most {_MAX_CHARACTERS} are allowed")
            answer = {"text": text}
        except _RefusalError as refusal:
            answer = {"refused": str(refusal)[:1000]}
        except Exception as error:
            answer = {"failed": _describe(error)}
        _answer(answer)


def _answer(values: Mapping[str, str]) -> None:
    sys.stdout.write(json.dumps(values) + "\n")
    sys.stdout.flush()


def _describe(error: Exception) -> str:
    if isinstance(error, MemoryError):
        return "it takes too much memory"
    return " ".join(str(error).split())[:1000] or type(error).__name__


def _limit_memory(size_bytes: int) -> None:
    if sys.platform == "win32":
        return
    import resource

    with contextlib.suppress(ValueError, OSError):  # a system or a caller whose limit is another
        resource.setrlimit(resource.RLIMIT_AS, (size_bytes, size_bytes))


def _compiler() -> Callable[[str], Callable[[Mapping[str, Any]], str]]:
    """What makes a function that renders out of a template."""
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class GenerationBlock(Extension):
        """Renders {% generation %} blocks, which only matter in training, as their content."""

        tags = {"generation"}  # noqa: RUF012 (the base class declares a set)

        def parse(self, parser: Parser) -> nodes.Node | list[nodes.Node]:
            """Replace the block by its body."""
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[GenerationBlock, loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals.update(raise_exception=_refuse, strftime_now=_now)
    return lambda text: environment.from_string(text).render


def _to_json(
    value: object,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Unlike jinja's own filter, without HTML escapes."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _refuse(message: str) -> str:
    raise _RefusalError(message)


def _now(pattern: str) -> str:
    return datetime.now().strftime(pattern)


if __name__ == "__main__":
    main()
