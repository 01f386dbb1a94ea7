"""Disks that fill up: the error names a file, nothing is lost, and the same call goes on once there is space."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from entrollm.compress import CodingOptions, compress_folder
from tests.support.checkpoints import write_checkpoint

if sys.platform != "linux" or os.geteuid() != 0:
    pytest.skip("only root mounts file systems", allow_module_level=True)

_LARGE = 64 << 20
_OPTIONS = CodingOptions(bits=4, shard_bytes=20_000)


@pytest.fixture
def resize(tmp_path: Path) -> Iterator[Callable[[int], None]]:
    """Gives a disk of its own, mounted at tmp_path / "disk", another size in bytes."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={_LARGE}", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("this machine lets nobody mount file systems")

    def remount(size: int) -> None:
        subprocess.run(["mount", "-o", f"remount,size={size}", disk], check=True)

    yield remount
    subprocess.run(["umount", "--lazy", disk], check=True)


def files(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in path.iterdir()}


def check_full(error: OSError, disk: Path) -> None:
    assert error.errno == errno.ENOSPC
    assert error.filename is not None and Path(error.filename).is_relative_to(disk)


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_disk_of_any_size(tmp_path: Path, resize: Callable[[int], None], overwrite: bool) -> None:
    generator = np.random.default_rng(3)
    names = ("embed.weight", "layers.0.up.weight", "layers.0.norm.weight", "head.weight")
    weights = {n: generator.standard_normal((96, 128) if "norm" not in n else 128).astype(np.float32) for n in names}
    checkpoint = write_checkpoint(tmp_path / "model", weights)
    compress_folder(checkpoint, tmp_path / "wanted", _OPTIONS)
    compress_folder(checkpoint, tmp_path / "old", CodingOptions(bits=3))
    wanted, old = files(tmp_path / "wanted"), files(tmp_path / "old")
    out = tmp_path / "disk" / "out"
    failures = resumed = 0
    for size in range(4096, _LARGE, 8192):
        for path in out.parent.iterdir():
            shutil.rmtree(path)
        resize(_LARGE)
        if overwrite:
            shutil.copytree(tmp_path / "old", out)
        taken = sum(file.stat().st_size + 4096 for file in out.iterdir()) if overwrite else 0
        resize(taken // 4096 * 4096 + size)
        try:
            compress_folder(checkpoint, out, _OPTIONS, overwrite=overwrite)
        except OSError as error:
            failures += 1
            check_full(error, out.parent)
            assert (files(out) if overwrite else None) == (old if overwrite else None) and out.exists() == overwrite
            resize(_LARGE)
            resumed += compress_folder(checkpoint, out, _OPTIONS, overwrite=overwrite).resumed_weights
            assert files(out) == wanted
            assert [path.name for path in out.parent.iterdir()] == ["out"]
        else:
            assert files(out) == wanted
            break
    assert failures >= 5 and resumed > 0
