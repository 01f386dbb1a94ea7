"""The load benchmark, with few requests."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "serve_load.py"


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the memory of a process is read from /proc")
def test_mixed_requests(folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "found.json"
    command = [sys.executable, str(SCRIPT), str(folder), "--requests", "60", "--json", str(file)]
    result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert result.returncode == 0, result.stderr
    found = json.loads(file.read_text())
    assert sum(found["requests"].values()) == 60
    assert {kind.partition(",")[0] for kind in found["requests"]} >= {"greedy", "huge", "malformed", "cancelled"}
