"""Calibrations that several processes share: what they find is what one process finds."""

import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from entrollm import CompressOptions, OptionError, compress
from entrollm.calibrate import check_windows
from entrollm.calibrate.inputs import batches
from entrollm.cli.main import app
from entrollm.compress import CodingOptions, Target, compress_folder
from entrollm.engine.load import load
from entrollm.errors import UnsupportedError
from entrollm.evaluate.divergence import token_divergences
from entrollm.processes import ALONE
from entrollm.torch import group as torch_group
from entrollm.torch.group import TorchGroup
from tests.calibrate.group_worker import device_of, fit, work
from tests.calibrate.test_walk import save_model
from tests.support.checkpoints import write_random_llama
from tests.support.paths import ROOT

# Between them: one that is measured as a whole, experts that one process alone sees, a tied head, positions, and
# matrices that are stored transposed.
NAMES = ("albert", "mixtral", "gpt2")
FOLDERS = ("shared", "alone")


class Group:
    """One of two processes, which never meets the other."""

    rank, size, neighbors = 1, 2, 2


def torchrun(*arguments: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([*(entry for entry in sys.path if entry), str(ROOT)])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", *arguments]
    return subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=300)


def assert_equal(found: Any, expected: Any, name: str, tolerance: float) -> None:
    if isinstance(expected, tuple | list):
        found, expected = dict(enumerate(found)), dict(enumerate(expected))
    if isinstance(expected, dict):
        assert list(found) == list(expected), name
        for key, value in expected.items():
            assert_equal(found[key], value, f"{name} {key}", tolerance)
    elif isinstance(expected, float) or (isinstance(expected, np.ndarray) and expected.dtype.kind == "f"):
        np.testing.assert_allclose(found, expected, atol=tolerance * np.abs(expected).max(), rtol=0, err_msg=name)
    elif isinstance(expected, np.ndarray):
        np.testing.assert_array_equal(found, expected, err_msg=name)
    else:
        assert found == expected, name


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_two_processes_find_what_one_finds(kind: str, checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    if kind == "cuda" and torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    models = [save_model("albert", tmp_path / "albert"), *(checkpoint(name) for name in NAMES[1:])]
    options = CodingOptions(target=Target(coded_bits=3.0), fine_scales=True, threads=1)
    made = compress_folder(models[-1], tmp_path / "made", options).path
    ran = torchrun("tests.calibrate.group_worker", kind, str(tmp_path), str(made), *map(str, models))
    assert ran.returncode == 0, ran.stderr
    found = pickle.loads((tmp_path / "found.pickle").read_bytes())
    torch.set_num_threads(1)
    device = device_of(kind, ALONE)
    alone = [work(model, tmp_path / f"alone-{name}", device) for name, model in zip(NAMES, models, strict=True)]
    alone.append(fit(models[-1], made, device))
    for name, shared, expected in zip((*NAMES, "fit"), found, alone, strict=True):
        assert_equal(shared, expected, name, 1e-5 if kind == "cpu" else 1e-3)


def test_the_command_writes_one_folder_and_speaks_once(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    model = write_random_llama(tmp_path / "model", layers=2, tied=True)
    options = ["compress", str(model), "--bpw", "5", "--calibration", "self", "--sampled", "16", "--overwrite"]
    ran = torchrun("entrollm", *options, "-o", str(tmp_path / "shared"))
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.count("bits/weight") == 1
    compress(model, tmp_path / "alone", CompressOptions(bpw=5.0, calibration="self", sampled=16))
    shared, alone = ({file.name: file.stat().st_size for file in (tmp_path / name).iterdir()} for name in FOLDERS)
    assert shared.keys() == alone.keys()
    assert sum(shared.values()) == pytest.approx(sum(alone.values()), rel=2e-3)
    ids = np.random.default_rng(3).integers(0, 512, 100)
    original, *made = (load(tmp_path / name, threads=1).logits(ids) for name in ("model", *FOLDERS))
    quality = [token_divergences(original, logits).mean() for logits in made]
    assert quality[0] == pytest.approx(quality[1], rel=0.2)


def test_a_process_that_fails_ends_the_others_and_says_why() -> None:
    ran = torchrun("tests.calibrate.group_worker", "fail")
    assert ran.returncode == 1
    assert "ValueError: this process has failed" in ran.stderr
    assert "lost the connection" not in ran.stderr


@pytest.mark.parametrize("rank", [0, 1])
def test_other_commands_are_refused_once(rank: int, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("TORCHELASTIC_RUN_ID", "none"), ("WORLD_SIZE", "2"), ("RANK", str(rank))):
        monkeypatch.setenv(name, value)
    result = CliRunner().invoke(app, ["run", "OUT", "-p", "Once"])
    if rank:
        assert (result.exit_code, result.output) == (0, "")
    else:
        assert result.exit_code == 2
        assert "torchrun is for compress with --calibration" in " ".join(result.output.split())


def test_nothing_but_calibration_is_shared(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=r"2 processes can share a calibration alone: add calibration=FILE"):
        compress(tmp_path, tmp_path / "out", CompressOptions(bpw=3.0), group=Group())


def test_more_processes_than_windows_are_refused() -> None:
    check_windows(2, Group())
    with pytest.raises(ValueError, match="on 1 windows can be shared by 1 processes at most, found 2; start fewer"):
        check_windows(1, Group())


def test_more_processes_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    group = object.__new__(TorchGroup)
    group.neighbors = 2
    group._kind = "cuda"
    monkeypatch.setattr(torch_group, "check_gpu", lambda: None)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(UnsupportedError, match=r"started 2 processes .* finds 1 GPU; .* use --nproc-per-node 1"):
        group.open()


@pytest.mark.parametrize(("windows", "processes", "sizes"), [(64, 1, 8), (64, 2, 8), (64, 8, 8), (9, 8, 1), (12, 2, 6)])
def test_batches_are_those_of_one_process_where_they_can_be(windows: int, processes: int, sizes: int) -> None:
    class Model:
        class config:  # noqa: N801 (as transformers has it)
            @staticmethod
            def get_text_config() -> Any:
                return None

    found = batches(np.zeros((windows, 4), np.int64), Model(), processes=processes)
    assert len(found) >= processes
    assert max(map(len, found)) - min(map(len, found)) <= 1
    assert min(map(len, found)) == sizes
