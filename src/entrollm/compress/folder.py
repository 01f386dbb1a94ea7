"""The output folder of a run. It is built beside its final path, can be resumed, and is renamed when it is complete."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from entrollm.errors import EntroLLMError, Message, Option, OptionError
from entrollm.format import layout
from entrollm.format.checksums import CHECKSUMS_NAME
from entrollm.format.reader import is_compressed, read_config
from entrollm.system import FolderLock, exchange, is_mount_point, naming, sync_folder, sync_tree

_log = logging.getLogger(__name__)
# Hidden files are no side files, so nothing of a model has such a name.
_PLAN = ".plan.json"
_PARTIAL, _REPLACED = ".partial", ".replaced"
# Files that an error lists; more are counted.
_LISTED = 8


class OutputFolder:
    """A folder that appears at `path` when `publish` is called. Until then its files are in `path`.partial.

    A later run with the same fingerprint continues where an interrupted one stopped.

    Args:
        path: the folder.
        fingerprint: a JSON object, equal for runs that may continue each other.
        overwrite: replace an earlier output.
    Raises:
        EntroLLMError: another run is writing the folder.
        ValueError: something else is at the path or beside it.
    """

    def __init__(self, path: Path, fingerprint: Mapping[str, Any], overwrite: bool) -> None:
        path = real_place(path)
        self.path = path
        self.partial = path.with_name(path.name + _PARTIAL)
        self._replaced = path.with_name(path.name + _REPLACED)
        self._marker = _marker_of(path)
        self._overwrite = overwrite
        check_output(path, overwrite)
        path.parent.mkdir(parents=True, exist_ok=True)
        self._adopt(json.dumps(fingerprint, indent=1, sort_keys=True))

    def publish(self) -> None:
        """Sync the folder and rename it to its path, replacing an earlier output if that is allowed.

        At every moment, one complete output is at the path if there was one before, where the system can let folders
        change places.
        """
        self._check_path()
        (self.partial / _PLAN).rename(self._marker)
        sync_tree(self.partial)
        self._take_place()
        try:
            self._tidy()
        except OSError as error:  # the output is complete; a later run removes what is left beside it
            _log.warning("%s is complete, but tidying up after it failed: %s", self.path, error)

    def close(self) -> None:
        """Release the lock; files that are not published stay for another run."""
        with contextlib.suppress(OSError):  # it was published, or whatever is in the way stays
            if [file.name for file in self.partial.iterdir()] == [_PLAN]:  # nothing was made
                (self.partial / _PLAN).unlink()
                self.partial.rmdir()
        self._lock.release()

    def write_text(self, name: str, text: str) -> None:
        """Write a small file and sync it."""
        self.write_bytes(name, text.encode())

    def write_bytes(self, name: str, content: bytes) -> None:
        """Write a small file, by its path in the folder, and sync it."""
        path = self.partial / name
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(path.name + ".tmp")
        with naming(path), temporary.open("wb") as out:
            out.write(content)
            out.flush()
            os.fsync(out.fileno())
        temporary.replace(path)

    def keep_only(self, names: Collection[str]) -> None:
        """Remove all files but those of these names, as paths in the folder, and the plan."""
        kept = {_PLAN, *names}
        for file in sorted(self.partial.rglob("*"), reverse=True):
            if file.is_dir() and not file.is_symlink():
                if not any(file.iterdir()):
                    file.rmdir()
            elif file.relative_to(self.partial).as_posix() not in kept:
                file.unlink()

    def _take_place(self) -> None:
        if self.path.exists() and not any(self.path.iterdir()):
            self.path.rmdir()
        if not self.path.exists():
            self.partial.rename(self.path)
        elif not exchange(self.partial, self.path):
            self.path.rename(self._replaced)
            try:
                self.partial.rename(self.path)
            except OSError:
                self._replaced.rename(self.path)
                raise

    def _tidy(self) -> None:
        """Remove the earlier output, which may have changed places with the new one."""
        if self.partial.exists():
            self.partial.rename(self._replaced)
        sync_folder(self.path.parent)
        if self._replaced.exists():
            shutil.rmtree(self._replaced)
        self._marker.unlink(missing_ok=True)

    def _check_path(self) -> None:
        if self._replaced.exists():
            raise ValueError(
                f"{self._replaced} holds an earlier output that a stopped run was replacing; remove it or rename it"
            )
        check_output(self.path, self._overwrite)

    def _recover(self) -> None:
        """Tidy up after a run that was stopped while it replaced an earlier output."""
        if not (self._marker.exists() and self._replaced.exists()):
            return
        if self.path.exists():
            shutil.rmtree(self._replaced)
        else:
            self._replaced.rename(self.path)

    def _adopt(self, fingerprint: str) -> None:
        """Lock the partial folder, tidy up after a run that was stopped, and take the folder over."""
        if self.partial.exists() and not self._was_ours():
            raise ValueError(f"{self.partial} is in the way and was not left by an interrupted run; move it")
        self.partial.mkdir(exist_ok=True)
        try:
            self._lock = FolderLock(self.partial)
        except BlockingIOError:
            raise EntroLLMError(f"another run is writing {self.path}; wait for it or name another folder") from None
        try:
            self._recover()
            self._check_path()
            self._take_over(fingerprint)
        except BaseException:
            with contextlib.suppress(OSError):
                self.partial.rmdir()  # unless it has files
            self._lock.release()
            raise

    def _take_over(self, fingerprint: str) -> None:
        """Make the locked folder that of a run: as it is for the same fingerprint, empty for another."""
        plan_file = self.partial / _PLAN
        if plan_file.is_file() and plan_file.read_text(encoding="utf-8") == fingerprint:
            self._marker.unlink(missing_ok=True)
            return
        # The plan goes last: without it, the folder would no longer be known as one of ours.
        for file in sorted(self.partial.iterdir(), key=lambda file: file.name == _PLAN):
            if file.is_dir() and not file.is_symlink():
                shutil.rmtree(file)
            else:
                file.unlink()
        self.write_text(_PLAN, fingerprint)
        self._marker.unlink(missing_ok=True)

    def _was_ours(self) -> bool:
        """Whether the folder that exists is empty or has a plan, possibly a half-written one or one beside it."""
        names = {file.name for file in self.partial.iterdir()} if self.partial.is_dir() else {""}
        return _PLAN in names or names <= {_PLAN + ".tmp"} or self._marker.exists()


def real_place(path: Path) -> Path:
    """Where a folder at `path` will lie: the target of a link, which stays one.

    Raises:
        ValueError: the current folder lies in it, and a folder that is replaced must not be anyone's current one; or
            a link leads back to itself.
    """
    try:
        current = Path.cwd()
        place = Path(os.path.realpath(path))
    except FileNotFoundError:
        raise ValueError("the current folder was removed; change to one that exists") from None
    if place.is_symlink():
        raise ValueError(f"{path} is a link that leads back to itself; name another folder")
    if current.is_relative_to(place):
        raise ValueError(f"{path} is the current folder or holds it; name another folder, such as {place.name}-out")
    return place


def remove_marker(path: Path) -> None:
    """Remove what a run left beside its complete output at `path` when it was stopped at its very end."""
    path = real_place(path)
    beside = (path.with_name(path.name + suffix) for suffix in (_PARTIAL, _REPLACED))
    if path.exists() and not any(other.exists() for other in beside):
        _marker_of(path).unlink(missing_ok=True)


def _marker_of(path: Path) -> Path:
    """Where the plan is while the folder is published: what is beside the output then is ours."""
    return path.with_name(f".{path.name}.publishing.json")


def check_output(path: Path, overwrite: bool) -> None:
    """Check that a model folder may be made at `path`; for use before long work.

    Raises:
        ValueError: something that is not a compressed model, or that may not be replaced, is at `path`.
    """
    path = real_place(path)
    _check_parent(path)
    if not path.exists():
        return
    if not path.is_dir():
        raise ValueError(f"{path} is a file; name a folder that does not exist yet")
    if is_mount_point(path):
        raise ValueError(
            f"{path} is a mount point, which cannot be renamed; name a folder in it, such as {path / 'model'}"
        )
    if not any(path.iterdir()):
        return
    if not _is_ours(path):
        raise ValueError(f"{path} exists and is not a compressed model; name a folder that does not exist yet")
    if not overwrite:
        remove_marker(path)
        raise OptionError(
            f"{path} exists", hint=Message("name another folder, or pass {} to replace it", Option("overwrite", True))
        )


def _check_parent(path: Path) -> None:
    """Check that a folder can be made at `path`, or renamed to it: the folder above, or what there is of it."""
    parent = next((parent for parent in path.parents if parent.exists() or parent.is_symlink()), path)
    if not parent.is_dir():
        raise ValueError(f"{parent} is not a folder, so {path} cannot be made; name another folder")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise ValueError(f"{parent} may not be written, so {path} cannot be made there; name a folder elsewhere")


def check_replaced(path: Path, names: Collection[str]) -> None:
    """Check that replacing the folder at `path` deletes nothing that is not of a model; for use before long work.

    Args:
        path: an earlier output, an empty folder or nothing.
        names: the files beside the weights that the new output will hold, as paths in it.
    Raises:
        ValueError: the folder holds others; the message lists them.
    """
    path = real_place(path)
    if not path.is_dir():
        return
    known = {"config.json", layout.INDEX_NAME, CHECKSUMS_NAME, _PLAN, *names}
    found = (file.relative_to(path) for file in path.rglob("*") if not file.is_dir() or file.is_symlink())
    others = [file.as_posix() for file in found if not (file.as_posix() in known or file.match("model*.safetensors"))]
    if others:
        listed = ", ".join(sorted(others)[:_LISTED]) + (f" and {len(others) - _LISTED} more" * (len(others) > _LISTED))
        raise ValueError(
            f"{path} holds files that the new output lacks, which replacing it would delete: {listed}; move or remove "
            "them, or name another folder"
        )


def _is_ours(path: Path) -> bool:
    """Whether a folder is a compressed model."""
    return (path / "config.json").is_file() and is_compressed(read_config(path))


def write_index(folder: OutputFolder, names: Mapping[str, str], total_bytes: int) -> None:
    """Write the index of a folder with several shards.

    Args:
        folder: the folder.
        names: the file of each entry.
        total_bytes: of all files.
    """
    index = {"metadata": {"total_size": total_bytes}, "weight_map": dict(names)}
    folder.write_text(layout.INDEX_NAME, json.dumps(index, indent=1) + "\n")
