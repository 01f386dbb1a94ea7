"""Locks of folders, renames that last, scratch folders, the size of the memory."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from entrollm.system import FolderLock, memory_bytes, scratch_folder, sync_folder


def test_a_folder_is_locked_once(tmp_path: Path) -> None:
    lock = FolderLock(tmp_path)
    with pytest.raises(BlockingIOError, match="is locked by another process"):
        FolderLock(tmp_path)
    lock.release()
    lock.release()
    FolderLock(tmp_path).release()


def test_a_lock_ends_with_its_process(tmp_path: Path) -> None:
    code = f"import os, pathlib, entrollm.system as s; s.FolderLock(pathlib.Path({str(tmp_path)!r})); os._exit(0)"
    subprocess.run([sys.executable, "-c", code], check=True)
    FolderLock(tmp_path).release()


def test_a_lock_allows_the_folder_to_be_renamed(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    lock = FolderLock(folder)
    folder.rename(tmp_path / "renamed")
    lock.release()
    assert [path.name for path in tmp_path.iterdir()] == ["renamed"]


def test_a_missing_folder_is_not_locked(tmp_path: Path) -> None:
    with pytest.raises(BlockingIOError):
        FolderLock(tmp_path / "missing")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(sys.platform == "win32", reason="Windows syncs no folders")
def test_a_scratch_folder_of_a_killed_process_is_removed(tmp_path: Path) -> None:
    code = (
        "import os, entrollm.system as s\n"
        f"with s.scratch_folder('x-', {str(tmp_path)!r}) as folder:\n"
        "    (folder / 'file').touch()\n"
        "    os._exit(0)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    (tmp_path / "y-other").mkdir()
    (left,) = tmp_path.glob("x-*/file")
    with scratch_folder("x-", tmp_path) as first, scratch_folder("x-", tmp_path) as second:
        assert not left.exists()
        assert {path.name for path in tmp_path.iterdir()} == {first.name, second.name, "y-other"}
    assert [path.name for path in tmp_path.iterdir()] == ["y-other"]


def test_only_a_folder_that_exists_is_synced(tmp_path: Path) -> None:
    sync_folder(tmp_path)
    with pytest.raises(FileNotFoundError):
        sync_folder(tmp_path / "missing")


@pytest.mark.skipif(not Path("/proc/meminfo").exists(), reason="needs /proc/meminfo")
def test_the_memory_is_what_the_system_reports() -> None:
    first = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()[0]
    assert memory_bytes() == int(first.split()[1]) * 1024
