"""What differs between operating systems: locks of folders, renames that last, the size of the memory."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

if sys.platform == "win32":
    import ctypes
    import msvcrt
else:
    import fcntl


class FolderLock:
    """An exclusive lock of a folder, which ends with the process at the latest.

    Windows cannot rename a folder while a file in it is open, so a file beside the folder is locked there, which
    disappears with the lock.

    Raises:
        BlockingIOError: another process holds the lock, or the folder was renamed before it was locked.
    """

    def __init__(self, folder: Path) -> None:
        self._descriptor = -1
        try:
            if sys.platform == "win32":
                flags = os.O_CREAT | os.O_RDWR | os.O_TEMPORARY | os.O_NOINHERIT
                self._descriptor = os.open(folder.with_name(folder.name + ".lock"), flags)
                msvcrt.locking(self._descriptor, msvcrt.LK_NBLCK, 1)
                locked = folder.is_dir()
            else:
                self._descriptor = os.open(folder, os.O_RDONLY)
                fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                locked = os.path.samestat(os.fstat(self._descriptor), folder.stat())
        except OSError:
            locked = False
        if not locked:
            self.release()
            raise BlockingIOError(f"{folder} is locked by another process")

    def release(self) -> None:
        """Release the lock; a second call does nothing."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Give errors of writing or mapping a file its name, which only those of opening it have by themselves."""
    try:
        yield
    except OSError as error:
        if error.errno is not None and error.filename is None:
            error.filename = str(path)
        raise


def sync_folder(path: Path) -> None:
    """Make renames in a folder durable; Windows opens no folders and records renames in the file system's journal."""
    if sys.platform == "win32":
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def memory_bytes() -> int:
    """The physical memory of the machine."""
    if sys.platform == "win32":
        status = _MemoryStatus(length=ctypes.sizeof(_MemoryStatus))
        if not ctypes.windll.kernel32.GlobalMemoryStatusEx(ctypes.byref(status)):
            raise ctypes.WinError()
        return int(status.total_physical)
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


if sys.platform == "win32":

    class _MemoryStatus(ctypes.Structure):
        """MEMORYSTATUSEX of the Windows API."""

        _fields_ = (
            ("length", ctypes.c_uint32),
            ("load_percent", ctypes.c_uint32),
            ("total_physical", ctypes.c_uint64),
            ("available_physical", ctypes.c_uint64),
            ("total_page_file", ctypes.c_uint64),
            ("available_page_file", ctypes.c_uint64),
            ("total_virtual", ctypes.c_uint64),
            ("available_virtual", ctypes.c_uint64),
            ("available_extended_virtual", ctypes.c_uint64),
        )
