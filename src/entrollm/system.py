"""What differs between operating systems: locks and exchanges of folders, renames that last, scratch
folders, the size of the memory."""

from __future__ import annotations

import ctypes
import errno
import glob
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

if sys.platform == "win32":
    import msvcrt
else:
    import fcntl

_SCRATCH_ATTEMPTS = 3


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
def scratch_folder(prefix: str, parent: str | Path | None = None) -> Iterator[Path]:
    """A temporary folder, locked while it is in use and removed at the end.

    Folders of the same prefix whose process was killed are removed first.

    Args:
        prefix: how its name begins.
        parent: where to make it; by default where the system wants temporary files.
    """
    place = Path(tempfile.gettempdir() if parent is None else parent)
    for earlier in place.glob(glob.escape(prefix) + "*"):
        _remove_abandoned(earlier)
    for _ in range(_SCRATCH_ATTEMPTS):
        folder = Path(tempfile.mkdtemp(prefix=prefix, dir=place))
        lock = _lock_of(folder)
        if lock is not None:
            break  # otherwise another process has taken it for abandoned, or nothing can be locked there
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)  # what is left, the next one removes
        if lock is not None:
            lock.release()


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A path for a new file, which takes the name `path` at the end unless there was an error.

    The file is made in a scratch folder beside `path` that this user alone can read. Where `path` is a link, the file
    that it leads to is replaced.

    Raises:
        OSError: the folder cannot be written to, or something else than a file has the name.
    """
    prefix = ".entrollm-new-"
    place = path.resolve() if path.is_symlink() else path
    try:
        with naming(path), scratch_folder(prefix, place.parent) as folder:
            temporary = folder / place.name
            yield temporary
            temporary.replace(place)
    except OSError as error:
        if prefix in str(error.filename):
            raise OSError(error.errno, error.strerror, str(path)) from None
        raise


def _remove_abandoned(folder: Path) -> None:
    lock = None if folder.is_symlink() else _lock_of(folder)
    if lock is not None:
        shutil.rmtree(folder, ignore_errors=True)
        lock.release()


def _lock_of(folder: Path) -> FolderLock | None:
    try:
        return FolderLock(folder)
    except BlockingIOError:
        return None


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
        with naming(path):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_tree(path: Path) -> None:
    """Make renames in a folder and its subfolders durable."""
    for place, _, _ in os.walk(path):
        sync_folder(Path(place))


def exchange(first: Path, second: Path) -> bool:
    """Let two folders of one file system change places in one step.

    Returns:
        False if the system or the file system cannot do that; nothing has changed then.
    Raises:
        OSError: they cannot be renamed.
    """
    if sys.platform == "linux":
        name, flag, here = "renameat2", 2, (-100,)  # RENAME_EXCHANGE, AT_FDCWD
    elif sys.platform == "darwin":
        name, flag, here = "renamex_np", 2, ()  # RENAME_SWAP
    else:
        return False
    function = getattr(ctypes.CDLL(None, use_errno=True), name, None)
    if function is None:
        return False
    if function(*here, os.fsencode(first), *here, os.fsencode(second), ctypes.c_uint(flag)) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):
        return False
    raise OSError(code, os.strerror(code), str(second))


def is_mount_point(path: Path, table: Path = Path("/proc/self/mountinfo")) -> bool:
    """Whether another file system, or another folder, is mounted at a path, which then cannot be renamed.

    Args:
        path: a folder.
        table: where Linux lists mounts; elsewhere only mounts of other file systems are known.
    """
    if path.is_mount():
        return True
    try:
        lines = table.read_bytes().splitlines()
    except OSError:
        return False
    # Spaces and the like are octal escapes.
    places = {line.split(b" ")[4].decode("unicode_escape").encode("latin-1") for line in lines}
    return os.fsencode(os.path.realpath(path)) in places


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
