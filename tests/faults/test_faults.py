"""A few calls of every kind that fail or are a run's last; `python -m tests.faults` goes through all of them."""

from __future__ import annotations

import shutil
import subprocess
import sys

import pytest

if sys.platform != "linux" or shutil.which("cc") is None:
    pytest.skip("calls are made to fail by a library that is compiled for Linux", allow_module_level=True)


def test_runs_whose_calls_fail() -> None:
    """The error names a file, an earlier output stays, the same call ends with equal files, and nothing is left."""
    how = ["--stride", "43", "--first", "3", "--actions", "kill", "ENOSPC", "EIO"]
    command = [sys.executable, "-m", "tests.faults", "bits", "overwrite", *how]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert ended.stdout.count(" runs disturbed,") == 2 and " 0 runs disturbed" not in ended.stdout
