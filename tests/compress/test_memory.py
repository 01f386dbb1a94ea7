"""Memory stays small: compressing never holds the model, and a loaded model is resident as its coded bytes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from entrollm.compress import CodingOptions, compress_folder

pytestmark = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")

_MEGABYTE = 1 << 20
# Ten matrices of 6.3 million weights: 24 MB each in float32, 240 MB together.
_SHAPE = (1536, 4096)
_MATRICES = 10
_LARGEST_BYTES = _SHAPE[0] * _SHAPE[1] * 4

_MEASURE = """
import json, sys
import numpy as np
from pathlib import Path

def status(*keys):
    lines = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    return sum(int(lines[key].split()[0]) << 10 for key in keys)
"""

_COMPRESS = (
    _MEASURE
    + """
from entrollm.compress import compress_folder
before = status("VmRSS")
compress_folder(sys.argv[1], sys.argv[2])
print(json.dumps({"peak": status("VmHWM"), "growth": status("VmHWM") - before}))
"""
)

_LOAD = (
    _MEASURE
    + """
from entrollm import _core
from entrollm.format.reader import CompressedModel
from entrollm.matrix import multiply, matrix_of
pool = _core.ThreadPool(2)
before, anonymous = status("RssFile", "RssAnon"), status("RssAnon")
model = CompressedModel.open(sys.argv[1])
matrices = [matrix_of(model, name) for name in model.specs]
opened = status("RssAnon") - anonymous
for matrix in matrices:
    multiply([matrix], np.ones((1, matrix.spec.columns), np.float32), pool)
    multiply([matrix], np.ones((5, matrix.spec.columns), np.float32), pool)
print(json.dumps({"opened": opened, "used": status("RssFile", "RssAnon") - before}))
"""
)


def run(script: str, *arguments: Path) -> dict[str, int]:
    """Run in a process of its own and return what it measured, in bytes."""
    command = [sys.executable, "-c", script, *map(str, arguments)]
    result: dict[str, int] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return result


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("memory") / "model"
    path.mkdir()
    rows = np.random.default_rng(0).standard_normal((64, _SHAPE[1])).astype(ml_dtypes.bfloat16)
    matrix = np.tile(rows, (_SHAPE[0] // 64, 1))
    save_file({f"{i}.weight": matrix for i in range(_MATRICES)}, path / "model.safetensors")
    (path / "config.json").write_text("{}")
    return path


def test_compressing_holds_a_few_tensors_at_most(checkpoint: Path, tmp_path: Path) -> None:
    measured = run(_COMPRESS, checkpoint, tmp_path / "out")
    # The promise, and a bound that a run which kept the model's integers, 60 MB, would break. Modules that are imported
    # on the way are part of the growth.
    assert measured["peak"] < 2 * _LARGEST_BYTES + 300 * _MEGABYTE
    assert measured["growth"] < 2 * _LARGEST_BYTES + 24 * _MEGABYTE


def test_a_loaded_model_is_resident_as_its_coded_bytes(checkpoint: Path, tmp_path: Path) -> None:
    result = compress_folder(checkpoint, tmp_path / "out", CodingOptions(bits=4))
    measured = run(_LOAD, tmp_path / "out")
    assert result.file_bytes < result.weights / 2  # a decoded copy would stand out
    # The header is parsed and the block sizes become offsets; code bytes are not copied.
    assert measured["opened"] < 4 * _MEGABYTE
    assert measured["used"] < 1.1 * result.file_bytes + 4 * _MEGABYTE
    assert measured["used"] > 0.9 * result.file_bytes  # all of it was read
