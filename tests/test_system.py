"""Locks of folders, renames that last, scratch folders, the size of the memory."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from entrollm.system import FolderLock, memory_bytes, replacing, scratch_folder, sync_folder


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


def test_a_file_is_replaced_when_it_is_complete(tmp_path: Path) -> None:
    """Neither other files of the user, nor what a killed process left, are in the way."""
    path, other = tmp_path / "a.txt", tmp_path / ".entrollm-new-left"
    other.mkdir()
    (other / "a.txt").write_text("half")
    path.write_text("old")
    with pytest.raises(ZeroDivisionError), replacing(path) as new:
        new.write_text("half")
        _ = 1 / 0
    assert path.read_text() == "old"
    with replacing(path) as new:
        new.write_text("new")
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]
    link = tmp_path / "link"
    link.symlink_to(path)
    with replacing(link) as new:
        new.write_text("newer")
    assert link.is_symlink() and path.read_text() == "newer"


def test_a_file_that_cannot_be_replaced_is_named(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    for path in (tmp_path / "missing" / "a.txt", folder):
        with pytest.raises(OSError, match=r"^[^>]*$") as caught, replacing(path) as new:
            new.write_text("new")
        assert caught.value.filename == str(path)
    assert list(tmp_path.iterdir()) == [folder]


def test_only_a_folder_that_exists_is_synced(tmp_path: Path) -> None:
    sync_folder(tmp_path)
    with pytest.raises(FileNotFoundError):
        sync_folder(tmp_path / "missing")


@pytest.mark.skipif(not Path("/proc/meminfo").exists(), reason="needs /proc/meminfo")
def test_the_memory_is_what_the_system_reports() -> None:
    first = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()[0]
    assert memory_bytes() == int(first.split()[1]) * 1024
