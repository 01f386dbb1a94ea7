"""Signals that end a command: temporary folders go with it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.support.paths import TINY_LLAMA

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such signals")


def start_demo(temporary: Path, text: Path, prefix: tuple[str, ...] = ()) -> subprocess.Popen[bytes]:
    """Start a command that keeps a temporary folder, and wait until it is there."""
    text.write_text("Once upon a time there was a king. " * 20000)
    command = [*prefix, sys.executable, "-m", "entrollm", "demo", "--model", str(TINY_LLAMA), "--text", str(text)]
    running = subprocess.Popen(
        [*command, "--windows", "500"],
        env=os.environ | {"TMPDIR": str(temporary)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    while not any(temporary.iterdir()):
        assert running.poll() is None
        time.sleep(0.02)
    return running


@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP"])
def test_a_signal_leaves_no_temporary_folder(tmp_path: Path, name: str) -> None:
    (tmp_path / "tmp").mkdir()
    number = getattr(signal, name)
    running = start_demo(tmp_path / "tmp", tmp_path / "text")
    running.send_signal(number)
    assert running.wait(60) == 128 + number
    assert list((tmp_path / "tmp").iterdir()) == []


def test_nohup_goes_on(tmp_path: Path) -> None:
    (tmp_path / "tmp").mkdir()
    running = start_demo(tmp_path / "tmp", tmp_path / "text", ("nohup",))
    running.send_signal(signal.SIGHUP)
    time.sleep(0.5)
    assert running.poll() is None
    running.terminate()
    assert running.wait(60) == 128 + signal.SIGTERM
