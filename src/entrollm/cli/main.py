"""The `entrollm` command: its options and the list of its commands, one file each.

A command file defines `command`, a typer function, and `EXAMPLES`, pairs of a command line and what it does. At its top
it imports only what parsing needs, so that --help is quick; the function imports the rest. A command that can print
JSON takes `json_output: JsonOption`; its errors are then printed as JSON as well.
"""

import importlib
import importlib.metadata
import inspect
import signal
import sys
from types import FrameType
from typing import Annotated

import typer

from entrollm.cli.console import examples_epilog, guard, report_error, stdout
from entrollm.cli.processes import refuse_to_share
from entrollm.cli.streams import naming_stdout
from entrollm.cli.usage import CommandGroup, normalize_option

_PACKAGE = "entrollm.cli"
_COMMANDS = (
    "compress",
    "plan",
    "run",
    "chat",
    "serve",
    "inspect",
    "verify",
    "eval",
    "compare",
    "report",
    "export",
    "demo",
    "info",
    "bench",
)
_EXAMPLES = (
    ("entrollm demo", "try it on the example model"),
    ("entrollm compress MODEL -o OUT", "compress a folder, a Hub id or a .gguf file"),
    ('entrollm run OUT -p "Once upon a time"', "generate text"),
    ("entrollm COMMAND --help", "show the options and examples of a command"),
)


def _print_version(requested: bool) -> None:
    if requested:
        stdout.print(f"entrollm {importlib.metadata.version('entrollm')}")
        raise typer.Exit()


def _main(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Large language models whose weights stay entropy-coded from disk to the matrix product."""
    if context.invoked_subcommand not in (None, "compress"):
        refuse_to_share(str(context.invoked_subcommand))


def _reflow(text: str) -> str:
    """Join the lines of each paragraph, so that the terminal's width decides where help wraps, not the source's."""
    return "\n\n".join(" ".join(paragraph.split()) for paragraph in text.split("\n\n"))


def _build_app() -> typer.Typer:
    application = typer.Typer(
        name="entrollm",
        no_args_is_help=True,
        add_completion=False,
        rich_markup_mode="rich",
        pretty_exceptions_enable=False,
        cls=CommandGroup,
        context_settings={"help_option_names": ["-h", "--help"], "token_normalize_func": normalize_option},
    )
    application.callback(epilog=examples_epilog(_EXAMPLES))(_main)
    for name in _COMMANDS:
        module = importlib.import_module(f"{_PACKAGE}.{name}")
        text = _reflow(inspect.getdoc(module.command) or "")
        application.command(name, help=text, epilog=examples_epilog(module.EXAMPLES))(guard(module.command))
    return application


app = _build_app()


def _end(number: int, _: FrameType | None) -> None:
    """End the program by an exception, so that temporary folders are removed; a second signal ends it at once."""
    signal.signal(number, signal.SIG_DFL)
    raise SystemExit(128 + number)


def _end_tidily() -> None:
    for name in ("SIGTERM", "SIGHUP"):
        number = getattr(signal, name, None)
        if number is not None and signal.getsignal(number) is signal.SIG_DFL:  # nohup ignores SIGHUP
            signal.signal(number, _end)


def run() -> None:
    """Run the command line on the arguments of the process."""
    _end_tidily()
    try:
        with naming_stdout():  # of help and version; commands report their own errors
            app()
    except OSError as error:
        sys.exit(report_error(error))
