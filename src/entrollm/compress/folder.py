"""The output folder of a run: built beside its place, resumable, and moved there only when complete."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from entrollm.errors import EntroLLMError
from entrollm.format import layout
from entrollm.format.reader import is_compressed, read_config

_PLAN = "plan.json"


class OutputFolder:
    """A folder that appears at `path` when `publish` is called; until then its files are in `path`.partial.

    A later run with the same plan goes on where an interrupted one stopped.
    """

    def __init__(self, path: Path, plan: Mapping[str, Any], overwrite: bool) -> None:
        path = real_place(path)
        self.path = path
        self.partial = path.with_name(path.name + ".partial")
        self._replaced = path.with_name(path.name + ".replaced")
        self._overwrite = overwrite
        self._check_place()
        path.parent.mkdir(parents=True, exist_ok=True)
        self._adopt(json.loads(json.dumps(plan)))

    def publish(self) -> None:
        """Sync the folder and give it its name, replacing an earlier output where that was allowed."""
        sync_folder(self.partial)
        self._check_place()
        if self.path.exists():
            self.path.rename(self._replaced)
        self.partial.rename(self.path)
        (self.path / _PLAN).unlink()
        sync_folder(self.path.parent)
        shutil.rmtree(self._replaced, ignore_errors=True)

    def close(self) -> None:
        """Give up the lock; what is not published stays for another run."""
        os.close(self._lock)

    def write_text(self, name: str, text: str) -> None:
        """Write a small file and sync it."""
        temporary = self.partial / (name + ".tmp")
        with temporary.open("w", encoding="utf-8") as out:
            out.write(text)
            out.flush()
            os.fsync(out.fileno())
        temporary.replace(self.partial / name)

    def _check_place(self) -> None:
        if self._replaced.exists():
            raise ValueError(
                f"{self._replaced} holds an earlier output that a stopped run was replacing; remove it or rename it"
            )
        check_output(self.path, self._overwrite)

    def _adopt(self, plan: dict[str, Any]) -> None:
        """Make the partial folder this run's: continue one with the same plan, clear one with another."""
        if self.partial.exists() and not self._was_ours():
            raise ValueError(f"{self.partial} is in the way and was not left by an interrupted run; move it")
        self.partial.mkdir(exist_ok=True)
        self._lock = os.open(self.partial, os.O_RDONLY)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # The other run may have published the folder between the two lines above.
            locked = os.path.samestat(os.fstat(self._lock), self.partial.stat())
        except OSError:
            locked = False
        if not locked:
            os.close(self._lock)
            raise EntroLLMError(f"another run is writing {self.path}; wait for it or name another folder")
        plan_file = self.partial / _PLAN
        if plan_file.is_file() and plan_file.read_text(encoding="utf-8") == _plan_text(plan):
            return
        # The plan goes last: without one, the rest would be taken for somebody else's.
        for file in sorted(self.partial.iterdir(), key=lambda file: file.name == _PLAN):
            if file.is_dir() and not file.is_symlink():
                shutil.rmtree(file)
            else:
                file.unlink()
        self.write_text(_PLAN, _plan_text(plan))

    def _was_ours(self) -> bool:
        """Whether a folder in the place of the partial one holds nothing or a plan, perhaps a half-written one."""
        names = {file.name for file in self.partial.iterdir()} if self.partial.is_dir() else {""}
        return _PLAN in names or names <= {_PLAN + ".tmp"}


def real_place(path: Path) -> Path:
    """Where a folder at `path` will lie: the target of a link, which stays one.

    Raises:
        ValueError: the current folder lies in it, and a folder that is replaced must not be anyone's current one.
    """
    place = Path(os.path.realpath(path))
    if Path.cwd().is_relative_to(place):
        raise ValueError(f"{path} is the current folder or holds it; name another folder, such as {place.name}-out")
    return place


def check_output(path: Path, overwrite: bool) -> None:
    """Check that a model folder may be made at `path`, before work that takes long.

    Raises:
        ValueError: something is there, and it is no compressed model or may not be replaced.
    """
    path = real_place(path)
    if not path.exists():
        return
    if not path.is_dir():
        raise ValueError(f"{path} is a file; name a folder that does not exist yet")
    if not any(path.iterdir()):
        return
    ours = (path / "config.json").is_file() and is_compressed(read_config(path))
    if not ours:
        raise ValueError(f"{path} exists and is no compressed model; name a folder that does not exist yet")
    if not overwrite:
        raise ValueError(f"{path} exists; name another folder, or pass --overwrite to replace it")


def write_index(folder: OutputFolder, names: Mapping[str, str], total_bytes: int) -> None:
    """Write the index of a folder with several shards: entry name to file."""
    index = {"metadata": {"total_size": total_bytes}, "weight_map": dict(names)}
    folder.write_text(layout.INDEX_NAME, json.dumps(index, indent=1) + "\n")


def sync_folder(path: Path) -> None:
    """Make renames in a folder durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _plan_text(plan: dict[str, Any]) -> str:
    return json.dumps(plan, indent=1, sort_keys=True)
