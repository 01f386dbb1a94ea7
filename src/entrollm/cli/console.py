"""Shared by all commands: the two consoles, JSON output, error lines, number formats and progress bars.

Results go to stdout; messages and progress go to stderr. With --json, stdout holds exactly one JSON object.
"""

import errno
import functools
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, ParamSpec, TypeVar

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.text import Text

from entrollm.cli.flags import write_flags
from entrollm.errors import EntroLLMError, OptionError
from entrollm.report.numbers import format_bytes, format_count, format_rate

__all__ = [
    "CheckOption",
    "JsonOption",
    "MemoryOption",
    "Stopwatch",
    "ThreadsOption",
    "describe_error",
    "directory_size_bytes",
    "examples_epilog",
    "format_bytes",
    "format_count",
    "format_rate",
    "guard",
    "json_safe",
    "message",
    "print_json",
    "progress_bar",
    "stderr",
    "stdout",
    "warn",
]

Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")

# A table that goes to a file or a pager is wider than the usual 80 columns, so that none of it is cut off.
_PIPE_WIDTH = 160
_TRACEBACK_VARIABLE = "ENTROLLM_TRACEBACK"

JsonOption = Annotated[
    bool, typer.Option("--json", help="Print one JSON object on stdout; messages and progress go to stderr.")
]
ThreadsOption = Annotated[
    int | None,
    typer.Option("--threads", min=1, metavar="N", help="Worker threads; by default one for each performance core."),
]
MemoryOption = Annotated[
    str,
    typer.Option(
        "--memory",
        metavar="auto|file|fast",
        help="Where coded weights are multiplied: in the file, or in a faster form in memory; entrollm info OUT tells.",
    ),
]

CheckOption = Annotated[
    bool,
    typer.Option("--check/--no-check", help="Compare the model's bytes with their checksums before they are used."),
]

stdout = Console(highlight=False, width=None if sys.stdout.isatty() else _PIPE_WIDTH)
stderr = Console(stderr=True, highlight=False)


def print_json(result: object) -> None:
    """Print `result` as the one JSON object of a --json run.

    Raises:
        ValueError: a number is not finite, which JSON cannot hold.
        TypeError: a value is not one of JSON's types.
    """
    sys.stdout.write(json.dumps(result, indent=2, allow_nan=False, ensure_ascii=False) + "\n")
    sys.stdout.flush()


def message(text: str) -> None:
    """Print a line for the user on stderr, without interpreting markup."""
    stderr.print(Text(text), soft_wrap=True)


def warn(text: str) -> None:
    """Print a yellow warning line on stderr."""
    stderr.print(Text.assemble(("warning: ", "yellow"), text), soft_wrap=True)


def describe_error(error: BaseException) -> str:
    """Say in one line what went wrong, with options as flags; operating system errors begin with their file."""
    if isinstance(error, OSError) and error.errno is not None:
        reason = os.strerror(error.errno)
        if error.errno == errno.ENOSPC:
            reason = "the disk is full; free some space and run the command again"
        return f"{error.filename}: {reason}" if error.filename else reason
    text = error.describe(write_flags) if isinstance(error, EntroLLMError) else str(error)
    return " ".join(text.split()) or type(error).__name__


def guard(command: Callable[Parameters, Result]) -> Callable[Parameters, Result]:
    """Report a user's errors in one line (as an object with --json) and exit with code 1; an interrupt exits with 130.

    EntroLLMError, ValueError and OSError are the user's errors; any other exception is a defect and keeps its
    traceback. With ENTROLLM_TRACEBACK=1 every exception keeps it.
    """

    @functools.wraps(command)
    def guarded(*args: Parameters.args, **kwargs: Parameters.kwargs) -> Result:
        try:
            return command(*args, **kwargs)
        except KeyboardInterrupt:
            message("interrupted")
            raise typer.Exit(130) from None
        except BrokenPipeError:
            raise  # nobody reads stdout any more: typer exits quietly
        except (EntroLLMError, ValueError, OSError) as error:
            if os.environ.get(_TRACEBACK_VARIABLE) == "1":
                raise
            if kwargs.get("json_output"):
                # Scripts know every wrong option as a ValueError.
                kind = "ValueError" if isinstance(error, OptionError) else type(error).__name__
                print_json({"error": {"type": kind, "message": describe_error(error)}})
            stderr.print(Text.assemble(("error: ", "bold red"), (describe_error(error), "red")), soft_wrap=True)
            raise typer.Exit(1) from None

    return guarded


def examples_epilog(examples: Sequence[tuple[str, str]]) -> str:
    """Format (command line, what it does) pairs as the examples at the end of a command's help."""
    width = max(len(command) for command, _ in examples)
    # A comment goes above its command where the two do not fit on a line of 80 columns.
    aside = all(width + len(purpose) <= 72 for _, purpose in examples)
    lines = ["[bold]Examples[/bold]"]
    for command, purpose in examples:
        shown, comment = f"$ [cyan]{escape(command)}[/cyan]", f"[dim]# {escape(purpose)}[/dim]"
        lines += [f"{shown}{' ' * (width - len(command))}  {comment}"] if aside else [comment, shown]
    return "\n".join(lines)


def directory_size_bytes(folder: str | Path) -> int:
    """Add up the sizes of the files below a folder."""
    return sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file())


class _RateColumn(ProgressColumn):
    """Amount per second since the task began."""

    def __init__(self, unit: str) -> None:
        super().__init__()
        self.unit = unit

    def render(self, task: Task) -> Text:
        return Text(format_rate(task.completed, task.elapsed or 0.0, self.unit), style="cyan")


@contextmanager
def progress_bar(description: str, unit: str = "B", *, quiet: bool = False) -> Iterator[Callable[[float, float], None]]:
    """Show a bar with rate and remaining time on stderr, or nothing if stderr is not a terminal.

    Args:
        description: what the command is doing.
        unit: 'B' for bytes, or the name of what is counted, such as 'tokens'.
        quiet: show nothing; commands pass their --json here.
    Yields:
        A callback (completed, total), cheap enough to call often.
    """
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f}%"),
        _RateColumn(unit),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=stderr, transient=True, disable=quiet or not sys.stderr.isatty()) as bar:
        task = bar.add_task(escape(description), total=None)

        def update(completed: float, total: float) -> None:
            bar.update(task, completed=completed, total=total)

        yield update


class Stopwatch:
    """Measures the wall time since its construction."""

    def __init__(self) -> None:
        self._start_s = time.perf_counter()

    @property
    def elapsed_s(self) -> float:
        """Seconds since construction."""
        return time.perf_counter() - self._start_s


def json_safe(value: Any) -> Any:
    """Replace numbers that JSON cannot hold (NaN, infinities) by None, also inside dicts, lists and tuples."""
    if isinstance(value, dict):
        return {key: json_safe(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [json_safe(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
