"""Write safetensors files of coded matrices and plain tensors, streaming; a file appears whole or not at all."""

from __future__ import annotations

import os
import shutil
import tempfile
import zlib
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self, cast

import numpy as np
from numpy.typing import NDArray

from entrollm.format import layout
from entrollm.format.header import TensorTable
from entrollm.format.layout import FileEntry
from entrollm.format.stored import StoredMatrix
from entrollm.system import naming

_COPY_BYTES = 1 << 22


class ShardWriter:
    """Writes one safetensors file. Data is spooled beside it; `close` writes the header and the data under its name.

    Entries that hold streams come first, so that they stay aligned; group scales and plain tensors follow.

    Args:
        path: the file.
        ordinary: whether it is an ordinary safetensors file, of plain tensors and without this format's metadata.

    Attributes:
        entries: the entries so far, in the order of the file.
        table: the tensors so far, as the header will list them.
    """

    def __init__(self, path: Path, ordinary: bool = False) -> None:
        self.path = path
        self._ordinary = ordinary
        self.entries: list[FileEntry] = []
        self.table = TensorTable()
        self._small: list[tuple[FileEntry, NDArray[Any]]] = []
        self._names: set[str] = set()
        # The file has no name where the system allows it, so that an interrupted run leaves nothing behind.
        self._spool = cast(BinaryIO, tempfile.TemporaryFile(dir=path.parent))  # noqa: SIM115 (the writer closes it)

    def add_matrix(self, matrix: StoredMatrix) -> None:
        """Add a coded matrix.

        Raises:
            ValueError: an entry of the file has its name, or a plain tensor was added before.
        """
        # A reader must not find another tensor under a suffix, so all of them are claimed, stored or not.
        for claimed in (matrix.name, *(matrix.name + suffix for suffix in layout.SUFFIXES)):
            self._claim(claimed)
        for suffix, array in matrix.entries.items():
            entry = FileEntry(matrix.name + suffix, layout.entry_dtype(suffix, array), array.shape, array.nbytes)
            if suffix in layout.ALIGNED:
                self.entries.append(entry)
                self._write(array.view(np.uint8))
            else:
                self._small.append((entry, array))
        self.table.add_matrix(matrix)

    def add_plain(self, name: str, dtype: str, shape: tuple[int, ...], chunks: Iterable[NDArray[Any]]) -> int:
        """Add a tensor in its own type; no coded matrix may follow.

        Args:
            name, dtype, shape: what it is; the type by its safetensors name.
            chunks: its elements in consecutive runs.
        Returns:
            its size in bytes.
        """
        self._flush_small()
        self._claim(name)
        size_bytes = checksum = 0
        for chunk in chunks:
            data = np.ascontiguousarray(chunk).reshape(-1).view(np.uint8)
            self._write(data)
            size_bytes += data.nbytes
            checksum = zlib.crc32(data.data, checksum)
        self.table.add_plain(name, checksum)
        self.entries.append(FileEntry(name, dtype, shape, size_bytes))
        return size_bytes

    def close(self) -> None:
        """Write the file, sync it to disk and give it its name."""
        temporary = self.path.with_name(self.path.name + ".tmp")
        try:
            self._flush_small()
            with naming(self.path), temporary.open("wb") as out:
                out.write(layout.build_header(self.entries, self._metadata()))
                self._spool.seek(0)
                shutil.copyfileobj(self._spool, out, _COPY_BYTES)
                out.flush()
                os.fsync(out.fileno())
            temporary.replace(self.path)
        finally:
            temporary.unlink(missing_ok=True)
            self._close_spool()

    def _write(self, data: NDArray[np.uint8]) -> None:
        with naming(self.path):
            self._spool.write(data.data)

    def _close_spool(self) -> None:
        with suppress(OSError):  # of bytes that it still buffers, on a full disk: seek() has raised that already
            self._spool.close()

    def _metadata(self) -> dict[str, str]:
        return {layout.FORMAT_KEY: "pt"} if self._ordinary else self.table.metadata()

    def _claim(self, name: str) -> None:
        if name in self._names:
            raise ValueError(f"{self.path}: two entries are called {name!r}")
        self._names.add(name)

    def _flush_small(self) -> None:
        for entry, array in self._small:
            self.entries.append(entry)
            self._write(array.view(np.uint8))
        self._small.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        else:
            self._close_spool()
