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
from entrollm.cli.streams import STDOUT, discard, naming_stdout, write_stdout
from entrollm.errors import EntroLLMError, OptionError
from entrollm.report.numbers import format_bytes, format_count, format_rate
from entrollm.system import replacing
from entrollm.threads import MAX_THREADS

__all__ = [
    "CacheTypeOption",
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
    "print_json_error",
    "progress_bar",
    "report_error",
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
    typer.Option(
        "--threads",
        min=1,
        max=MAX_THREADS,
        metavar="N",
        help="Worker threads; by default one for each performance core.",
    ),
]
MemoryOption = Annotated[
    str,
    typer.Option(
        "--memory",
        metavar="FORM|SIZE",
        help="Where coded weights are multiplied: file, in the file; fast, in a faster form in memory; auto, what "
        "suits the machine (entrollm info OUT tells). SIZE, such as 8GB, is for experts larger than memory: that much "
        "of the file is held.",
    ),
]
CacheTypeOption = Annotated[
    str,
    typer.Option(
        "--cache-type",
        metavar="f32|f16|int8",
        help="How keys and values of the tokens so far are held: f16 takes half the memory, int8 about a quarter.",
    ),
]

CheckOption = Annotated[
    bool,
    typer.Option("--check/--no-check", help="Compare the model's bytes with their checksums before they are used."),
]


class _ResultConsole(Console):
    """A console on standard output, whose errors name it."""

    def print(self, *objects: Any, **options: Any) -> None:
        with naming_stdout():
            super().print(*objects, **options)


stdout = _ResultConsole(highlight=False, width=None if sys.stdout.isatty() else _PIPE_WIDTH)
stderr = Console(stderr=True, highlight=False)


def print_json(result: object) -> None:
    """Print `result` as the one JSON object of a --json run.

    Raises:
        ValueError: a number is not finite, which JSON cannot hold.
        TypeError: a value is not one of JSON's types.
    """
    is_unicode = (sys.stdout.encoding or "utf-8").lower().startswith("utf")
    write_stdout(json.dumps(result, indent=2, allow_nan=False, ensure_ascii=not is_unicode) + "\n")


def message(text: str) -> None:
    """Print a line for the user on stderr, without interpreting markup."""
    _tell(Text(text))


def warn(text: str) -> None:
    """Print a yellow warning line on stderr."""
    _tell(Text.assemble(("warning: ", "yellow"), text))


def _tell(line: Text) -> None:
    """Print a line on stderr; work goes on where nobody can read it."""
    try:
        stderr.print(line, soft_wrap=True)
    except OSError:
        discard(sys.stderr)


def describe_error(error: BaseException) -> str:
    """Say in one line what went wrong, with options as flags; operating system errors begin with their file."""
    if isinstance(error, OSError) and error.errno is not None:
        reason = os.strerror(error.errno)
        if error.errno == errno.ENOSPC:
            reason = "the disk is full; free some space and run the command again"
        return f"{os.fsdecode(error.filename)}: {reason}" if isinstance(error.filename, str | bytes) else reason
    text = error.describe(write_flags) if isinstance(error, EntroLLMError) else str(error)
    text = " ".join(text.split())
    if isinstance(error, MemoryError) or _is_lack_of_memory(error):
        return "out of memory" + (f": {text}" if text else "")
    if _is_lack_of_threads(error):
        return "the system does not let this process start another thread; use fewer, with --threads"
    return text or type(error).__name__


def _is_lack_of_threads(error: BaseException) -> bool:
    return isinstance(error, RuntimeError) and str(error) == "can't start new thread"


def _is_lack_of_memory(error: BaseException) -> bool:
    """Whether a library could not be mapped; the words are glibc's."""
    return isinstance(error, ImportError) and any(
        words in str(error) for words in ("failed to map segment", "cannot allocate memory", "Cannot allocate memory")
    )


def guard(command: Callable[Parameters, Result]) -> Callable[Parameters, Result]:
    """Report a user's errors in one line (as an object with --json) and exit with code 1; an interrupt exits with 130.

    EntroLLMError, ValueError, OSError and a lack of memory or threads are the user's errors; any other exception is a
    defect and keeps its traceback. With ENTROLLM_TRACEBACK=1 every exception keeps it.
    """

    @functools.wraps(command)
    def guarded(*args: Parameters.args, **kwargs: Parameters.kwargs) -> Result:
        # `compare` has a file in place of the flag.
        is_json = bool(kwargs.get("json_output")) or str(kwargs.get("json_file")) == "-"
        try:
            result = command(*args, **kwargs)
            write_stdout("")
        except KeyboardInterrupt:
            if is_json:
                print_json_error("KeyboardInterrupt", "interrupted")
            message("interrupted")
            raise typer.Exit(130) from None
        except BrokenPipeError:
            raise  # nobody reads stdout any more: typer exits quietly
        except (EntroLLMError, ValueError, OSError, MemoryError, RuntimeError, ImportError) as error:
            is_defect = isinstance(error, RuntimeError | ImportError)
            if is_defect and not (_is_lack_of_threads(error) or _is_lack_of_memory(error)):
                raise
            if os.environ.get(_TRACEBACK_VARIABLE) == "1":
                raise
            raise typer.Exit(report_error(error, is_json=is_json)) from None
        return result

    return guarded


def report_error(error: Exception, *, is_json: bool = False) -> int:
    """Report an error on stderr, and on stdout as an object if `is_json`; returns the exit code."""
    if isinstance(error, OSError) and error.filename == STDOUT:
        discard(sys.stdout)
    text = describe_error(error)
    if is_json:
        # Scripts know every wrong option as a ValueError.
        print_json_error("ValueError" if isinstance(error, OptionError) else type(error).__name__, text)
    _tell(Text.assemble(("error: ", "bold red"), (text, "red")))
    return 1


def print_json_error(kind: str, text: str) -> None:
    """Print the object of a --json run that failed, unless stdout takes nothing."""
    try:
        print_json({"error": {"type": kind, "message": text}})
    except OSError:
        discard(sys.stdout)


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


def write_text(path: Path, text: str) -> None:
    """Write a file in one step.

    Raises:
        OSError: it cannot be written; the error names it.
    """
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
