"""The frame of the command line: help, errors, exit codes and the --json discipline."""

import errno
import io
import json
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Annotated

import pytest
import typer
from typer.testing import CliRunner

from entrollm.cli import console
from entrollm.cli.main import app
from entrollm.errors import CorruptStreamError, FormatError


def run_raising(error: BaseException | None, *args: str):
    """Run a one-command application whose command raises `error` behind the guard."""
    application = typer.Typer(pretty_exceptions_enable=False)

    def command(json_output: console.JsonOption = False, count: Annotated[int, typer.Option()] = 1) -> None:
        if error is not None:
            raise error
        if json_output:
            console.message("on the way")
            console.print_json({"count": count})

    application.command()(console.guard(command))
    return CliRunner().invoke(application, list(args))


def test_help_lists_the_commands_and_teaches_with_examples() -> None:
    result = CliRunner().invoke(app, ["--help"])
    assert result.exit_code == 0
    assert "Examples" in result.stdout
    assert "$ entrollm compress MODEL -o OUT" in result.stdout


def test_every_command_has_help_with_examples() -> None:
    names = {command.name for command in app.registered_commands}
    assert names == {
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
    }
    for command in app.registered_commands:
        result = CliRunner().invoke(app, [command.name or "", "--help"])
        assert result.exit_code == 0, command.name
        assert f"$ entrollm {command.name}" in result.stdout


def test_the_package_runs_as_a_module() -> None:
    result = subprocess.run([sys.executable, "-m", "entrollm", "--help"], capture_output=True, text=True, check=True)
    assert "entrollm compress MODEL -o OUT" in result.stdout


def test_an_unknown_command_is_a_usage_error() -> None:
    result = CliRunner().invoke(app, ["compres"])
    assert result.exit_code == 2
    assert "compres" in result.stderr


def test_help_imports_neither_torch_nor_the_hub() -> None:
    program = (
        "import sys\n"
        "from typer.testing import CliRunner\n"
        "from entrollm.cli.main import app\n"
        "assert CliRunner().invoke(app, ['--help']).exit_code == 0\n"
        "print([name for name in ('torch', 'transformers', 'huggingface_hub') if name in sys.modules])\n"
    )
    output = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60)
    assert output.stdout.strip() == "[]"


def test_a_format_error_is_one_line_and_code_1() -> None:
    result = run_raising(FormatError("shard x.safetensors [0]: 8 bytes\nexpected, 4 found"))
    assert result.exit_code == 1
    assert result.stdout == ""
    assert result.stderr == "error: shard x.safetensors [0]: 8 bytes expected, 4 found\n"


def test_json_errors_are_one_object_on_stdout() -> None:
    result = run_raising(CorruptStreamError("block 3 ends early"), "--json")
    assert result.exit_code == 1
    assert json.loads(result.stdout) == {"error": {"type": "CorruptStreamError", "message": "block 3 ends early"}}
    assert result.stderr == "error: block 3 ends early\n"


def test_json_result_is_alone_on_stdout() -> None:
    result = run_raising(None, "--json", "--count", "7")
    assert result.exit_code == 0
    assert json.loads(result.stdout) == {"count": 7}
    assert result.stderr == "on the way\n"


def test_a_missing_file_names_it() -> None:
    result = run_raising(FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), "model.json"))
    assert result.exit_code == 1
    assert result.stderr == "error: model.json: No such file or directory\n"


def test_a_full_disk_says_so() -> None:
    result = run_raising(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "out/model.safetensors"))
    assert result.exit_code == 1
    assert result.stderr.startswith("error: out/model.safetensors: the disk is full; free some space")


def test_an_interrupt_exits_130() -> None:
    result = run_raising(KeyboardInterrupt())
    assert result.exit_code == 130
    assert result.stderr == "interrupted\n"


def test_a_defect_keeps_its_traceback() -> None:
    result = run_raising(RuntimeError("defect"))
    assert isinstance(result.exception, RuntimeError)


def test_the_traceback_variable_keeps_user_errors_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ENTROLLM_TRACEBACK", "1")
    result = run_raising(FormatError("bad"))
    assert isinstance(result.exception, FormatError)


def test_an_error_without_text_still_says_its_type() -> None:
    assert console.describe_error(ValueError()) == "ValueError"


def test_print_json_refuses_what_json_cannot_hold() -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        console.print_json({"perplexity": float("nan")})


def test_json_safe_replaces_numbers_that_are_not_finite() -> None:
    value = {"a": [float("inf"), 1.5], "b": (float("nan"), "x")}
    assert console.json_safe(value) == {"a": [None, 1.5], "b": [None, "x"]}


@pytest.mark.parametrize(
    ("size_bytes", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1 kB"), (31_470_336, "31.5 MB"), (999_700, "1 MB"), (1.9e9, "1.9 GB")],
)
def test_format_bytes(size_bytes: float, text: str) -> None:
    assert console.format_bytes(size_bytes) == text


@pytest.mark.parametrize(
    ("amount", "elapsed_s", "unit", "text"),
    [
        (62_100_000, 1.0, "weights", "62.1 Mweights/s"),
        (32, 2.0, "tokens", "16 tokens/s"),
        (3_000_000, 2.0, "B", "1.5 MB/s"),
        (1, 0.0, "B", "- B/s"),
    ],
)
def test_format_rate(amount: float, elapsed_s: float, unit: str, text: str) -> None:
    assert console.format_rate(amount, elapsed_s, unit) == text


def test_format_count() -> None:
    assert [console.format_count(n) for n in (12, 1234, 15_735_168)] == ["12", "1.23 k", "15.7 M"]


def test_the_bar_is_silent_where_stderr_is_no_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    with console.progress_bar("reading [x]") as update:
        update(1, 2)
    assert stream.getvalue() == ""


def terminal(monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    stream = Terminal()
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setattr(console, "stderr", console.Console(stderr=True, force_terminal=True, width=100))
    return stream


@pytest.mark.parametrize("quiet", [False, True])
def test_the_bar_shows_the_rate_on_a_terminal_unless_quiet(monkeypatch: pytest.MonkeyPatch, quiet: bool) -> None:
    stream = terminal(monkeypatch)
    with console.progress_bar("reading [x]", "tokens", quiet=quiet) as update:
        update(5, 10)
    assert ("tokens/s" in stream.getvalue()) != quiet
    assert ("reading [x]" in stream.getvalue()) != quiet


def test_directory_size_counts_files_below(tmp_path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x").write_bytes(b"123")
    (tmp_path / "y").write_bytes(b"45")
    assert console.directory_size_bytes(tmp_path) == 5


def test_guard_keeps_the_signature_for_typer() -> None:
    def command(json_output: console.JsonOption = False) -> int:
        """Doc."""
        return 3

    guarded: Callable[..., int] = console.guard(command)
    assert guarded() == 3
    assert guarded.__doc__ == "Doc."
