"""Standard streams that are closed, full or interrupted, and limits of the system: one line, never a traceback."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from entrollm.cli import console
from entrollm.cli.main import app
from tests.support.paths import TINY_LLAMA

RUN = f"run {TINY_LLAMA} --max-tokens 2"
pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="the shell and the devices of POSIX")


def shell(line: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run `entrollm` with the redirections of a line of the shell."""
    command = f"{sys.executable} -m entrollm {line}"
    return subprocess.run(
        ["bash", "-c", command], capture_output=True, text=True, timeout=120, env=os.environ | environment
    )


@pytest.mark.parametrize("closed", ["<&-", "2>&-", ">&-", "<&- >&- 2>&-"])
def test_a_closed_stream_is_not_missed(closed: str) -> None:
    result = shell(f"{RUN} -p 'The king' {closed}")
    assert result.returncode == 0
    assert "Traceback" not in result.stderr
    assert bool(result.stdout) == (">&-" not in closed.replace("2>&-", ""))


def test_no_input_is_no_prompt() -> None:
    for source in ("<&-", "</dev/null"):
        result = shell(f"{RUN} {source}")
        assert result.returncode == 1
        assert result.stderr.startswith("error: there is no prompt: standard input is empty")


def test_a_file_that_a_command_writes_does_not_take_the_place_of_a_closed_stream(tmp_path: Path) -> None:
    out = tmp_path / "results.json"
    text = tmp_path / "text.txt"
    text.write_text("The king was there. " * 200)
    line = f"compare {TINY_LLAMA} {TINY_LLAMA} --text {text} --window 16 --max-windows 1 --json {out} <&- >&- 2>&-"
    assert shell(line).returncode == 0
    assert json.loads(out.read_text())["windows"] == 1


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux has /dev/full")
@pytest.mark.parametrize(
    "line", [f"{RUN} -p x", f"{RUN} -p x --json", f"{RUN} --nonsense --json", "--help", "run --help", "--version"]
)
def test_a_full_stdout_is_named(line: str) -> None:
    result = shell(f"{line} >/dev/full")
    assert result.returncode != 0
    assert "Traceback" not in result.stderr
    if "nonsense" not in line:
        expected = "error: standard output: the disk is full; free some space and run the command again\n"
        assert result.stderr == expected


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux has /dev/full")
def test_a_full_stderr_loses_only_messages() -> None:
    result = shell(f"{RUN} -p 'The king' 2>/dev/full")
    assert result.returncode == 0
    assert result.stdout == shell(f"{RUN} -p 'The king'").stdout


def test_characters_that_an_encoding_lacks_are_escaped() -> None:
    result = shell("run /no/é/folder -p x --json", PYTHONIOENCODING="ascii")
    assert result.returncode == 1
    assert "/no/é/folder" in json.loads(result.stdout)["error"]["message"]
    assert "/no/\\xe9/folder" in result.stderr


def test_a_path_that_is_not_utf8_can_be_reported() -> None:
    result = shell(r"run $'/no/\xff/folder' -p x --json")
    assert result.returncode == 1
    assert "/no/\udcff/folder" in json.loads(result.stdout)["error"]["message"]


def test_an_interrupt_is_one_line_also_while_importing() -> None:
    """Interrupt at moments from the first import to the end: never a traceback."""
    seen = set()
    for delay_ms in range(40, 640, 60):
        command = [sys.executable, "-m", "entrollm", "run", str(TINY_LLAMA), "-p", "The king", "--max-tokens", "200"]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
            time.sleep(delay_ms / 1000)
            process.send_signal(signal.SIGINT)
            _, stderr = process.communicate(timeout=60)
        # Python itself reports an interrupt that comes before the package is imported, which takes 0.03 s.
        assert "Traceback" not in stderr or not re.search(r"__main__\.py\", line \d+, in main", stderr), stderr
        seen.add(process.returncode)
    assert seen <= {0, 1, 130, -signal.SIGINT}


@pytest.mark.parametrize(("program", "is_command"), [("/usr/bin/entrollm", True), ("-m", False), ("script.py", False)])
def test_an_interrupt_while_the_package_is_imported(program: str, is_command: bool) -> None:
    """It ends the command without a word, and raises KeyboardInterrupt in other programs."""
    code = (
        "import os, signal, sys\n"
        # A job in the background of a shell inherits that interrupts are ignored.
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        f"sys.argv[0] = {program!r}\n"
        "class Finder:\n"
        "    def find_spec(name, path=None, target=None):\n"
        "        if name == 'entrollm.recipes':\n"
        "            os.kill(os.getpid(), signal.SIGINT)\n"
        "sys.meta_path.insert(0, Finder)\n"
        "import entrollm"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (result.returncode, bool(result.stderr)) == (-signal.SIGINT, not is_command)


def test_an_interrupted_json_run_prints_an_object() -> None:
    application = typer.Typer(pretty_exceptions_enable=False)

    def command(json_output: console.JsonOption = False) -> None:
        raise KeyboardInterrupt

    application.command()(console.guard(command))
    result = CliRunner().invoke(application, ["--json"])
    assert result.exit_code == 130
    assert json.loads(result.stdout) == {"error": {"type": "KeyboardInterrupt", "message": "interrupted"}}


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (MemoryError(), "out of memory"),
        (MemoryError("Unable to allocate 9 GiB"), "out of memory: Unable to allocate 9 GiB"),
        (RuntimeError("can't start new thread"), "use fewer, with --threads"),
    ],
)
def test_limits_of_the_system_are_one_line(error: Exception, message: str) -> None:
    application = typer.Typer(pretty_exceptions_enable=False)

    def command(json_output: console.JsonOption = False) -> None:
        raise error

    application.command()(console.guard(command))
    result = CliRunner().invoke(application, ["--json"])
    assert result.exit_code == 1
    assert message in json.loads(result.stdout)["error"]["message"]
    assert message in result.stderr


def test_threads_that_the_system_does_not_allow_are_one_line() -> None:
    # NumPy's own threads take address space too, on machines with many processors.
    command = f"ulimit -v 3000000; OPENBLAS_NUM_THREADS=1 {sys.executable} -m entrollm {RUN} -p x --threads 1000"
    result = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=120)
    assert result.returncode == 1
    assert result.stderr.startswith("error: the system does not let this process start 1000 threads")


@pytest.mark.parametrize("threads", ["40000", "100000000000000000000", "0", "-1"])
def test_numbers_of_threads_out_of_range_are_usage_errors(threads: str) -> None:
    for command in (["run", str(TINY_LLAMA), "-p", "x"], ["compress", str(TINY_LLAMA), "-o", "/no/where"], ["info"]):
        result = CliRunner().invoke(app, [*command, "--threads", threads, "--json"])
        assert result.exit_code == 2
        assert json.loads(result.stdout)["error"]["type"] == "UsageError"
