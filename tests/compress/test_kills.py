"""A run that is killed at any moment of its renames, syncs and removals leaves a whole output or none."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from entrollm.compress import CodingOptions, compress_folder, folder
from tests.support.checkpoints import write_checkpoint

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")

OLD, NEW = CodingOptions(bits=8, shard_bytes=3000), CodingOptions(bits=4, shard_bytes=3000)
_STEPS = ("rename", "replace", "fsync", "unlink", "rmdir", "mkdir")


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    generator = np.random.default_rng(3)
    names = ("embed.weight", "layers.0.up.weight", "layers.0.norm.weight", "head.weight")
    weights = {n: generator.standard_normal((40, 64) if "norm" not in n else 64).astype(np.float32) for n in names}
    path = write_checkpoint(tmp_path / "model", weights)
    (path / "1_Pooling").mkdir()
    (path / "1_Pooling" / "config.json").write_text("{}")
    return path


def files(path: Path) -> dict[str, bytes]:
    return {str(file.relative_to(path)): file.read_bytes() for file in path.rglob("*") if file.is_file()}


def killed_before(step: int, run: Callable[[], object], exchanges: bool) -> bool:
    """Run in a forked process that is killed before its step of this number; whether it got that far."""
    child = os.fork()
    if child == 0:
        left = step

        def counted(call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            nonlocal left
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            left -= 1
            return call(*args, **kwargs)

        for name in _STEPS:
            setattr(os, name, partial(counted, getattr(os, name)))
        folder.exchange = partial(counted, folder.exchange) if exchanges else lambda *_: False
        try:
            run()
        except BaseException as error:
            os.write(2, repr(error).encode())
            os._exit(2)
        os._exit(0)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code in (0, -signal.SIGKILL)
    return code != 0


@pytest.mark.parametrize(("overwrite", "exchanges"), [(False, True), (True, True), (True, False)])
def test_killed_at_every_step(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, overwrite: bool, exchanges: bool
) -> None:
    monkeypatch.setattr(os, "fsync", lambda _: None)  # a killed process loses nothing that is written
    compress_folder(checkpoint, tmp_path / "wanted", NEW)
    compress_folder(checkpoint, tmp_path / "old", OLD)
    new, old = files(tmp_path / "wanted"), files(tmp_path / "old")
    place = tmp_path / "place"
    out = place / "out"
    step, seen = 0, set()
    while True:
        if overwrite:
            compress_folder(checkpoint, out, OLD, overwrite=True)
        else:
            for file in sorted(place.rglob("*"), reverse=True):
                file.rmdir() if file.is_dir() else file.unlink()
        if not killed_before(step, lambda: compress_folder(checkpoint, out, NEW, overwrite=overwrite), exchanges):
            break
        found = files(out) if out.exists() else None
        assert found in (old, new, None)
        if overwrite and exchanges:
            assert found is not None
        seen.add("none" if found is None else "new" if found == new else "old")
        if found != new or overwrite:
            compress_folder(checkpoint, out, NEW, overwrite=overwrite)
            assert files(out) == new
            assert [path.name for path in place.iterdir()] == ["out"]
        step += 1
    assert files(out) == new and [path.name for path in place.iterdir()] == ["out"]
    assert step > 25
    assert seen >= ({"old", "new"} if overwrite else {"none", "new"})
