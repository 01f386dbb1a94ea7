"""Write safetensors files of coded matrices and plain tensors, streaming; a file appears whole or not at all."""

from __future__ import annotations

import dataclasses
import os
import shutil
import tempfile
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self, cast

import numpy as np
from numpy.typing import NDArray

from entrollm.format import layout
from entrollm.format.entry import pack
from entrollm.format.header import TensorTable
from entrollm.format.layout import StoredEntry
from entrollm.format.spec import TensorSpec

_COPY_BYTES = 1 << 22


def matrix_bytes(table: TensorTable, name: str, spec: TensorSpec, arrays: Mapping[str, NDArray[Any]]) -> int:
    """What a packed matrix would add to a file whose table so far is given, to within a few bytes."""
    size = sum(layout.entry_bytes(name, suffix, array) for suffix, array in arrays.items())
    return size + table.spec_bytes(name, spec.to_json())


class ShardWriter:
    """One safetensors file. Data is spooled beside it, then the header and the data are written under its name.

    The entries that hold streams come first, so that they stay aligned; group scales and plain tensors follow. An
    `ordinary` file holds plain tensors alone and says nothing of this format.
    """

    def __init__(self, path: Path, ordinary: bool = False) -> None:
        self.path = path
        self._ordinary = ordinary
        self.entries: list[StoredEntry] = []
        self._table = TensorTable()
        self._small: list[tuple[StoredEntry, NDArray[Any]]] = []
        self._names: set[str] = set()
        # Unnamed where the system can: an interrupted run leaves nothing behind.
        self._spool = cast(BinaryIO, tempfile.TemporaryFile(dir=path.parent))  # noqa: SIM115 (closed with the writer)

    def add_matrix(self, name: str, spec: TensorSpec, arrays: Mapping[str, NDArray[Any]]) -> TensorSpec:
        """Add a coded matrix.

        Args:
            name: the tensor's name in the original checkpoint.
            spec: its spec; the checksum is filled in here.
            arrays: by suffix of layout.SUFFIXES, packed or with streams already padded; empty arrays are left out.
        Returns:
            the spec as stored.
        """
        spec, stored = (spec, dict(arrays)) if layout.CODED in arrays else pack(spec, arrays)
        spec = dataclasses.replace(spec, checksum=layout.checksum(name, spec.to_json(), stored))
        # All suffixes are taken, stored or not: a reader must not find another tensor under one of them.
        for claimed in (name, *(name + suffix for suffix in layout.SUFFIXES)):
            self._claim(claimed)
        for suffix in layout.SUFFIXES:
            if suffix not in stored:
                continue
            array = stored[suffix]
            entry = StoredEntry(name + suffix, layout.entry_dtype(suffix, array), array.shape, array.nbytes)
            if suffix == layout.CODED:
                self.entries.append(entry)
                self._spool.write(array.view(np.uint8).data)
            else:
                self._small.append((entry, array))
        self._table.add_spec(name, spec.to_json())
        return spec

    def matrix_bytes(self, name: str, spec: TensorSpec, arrays: Mapping[str, NDArray[Any]]) -> int:
        """What a packed matrix would add to the file, its part of the header included, to within a few bytes."""
        return matrix_bytes(self._table, name, spec, arrays)

    def add_plain(self, name: str, dtype: str, shape: tuple[int, ...], chunks: Iterable[NDArray[Any]]) -> int:
        """Add a tensor in its own type, given as consecutive chunks; no coded matrix may follow. Returns its bytes."""
        self._flush_small()
        self._claim(name)
        size_bytes = checksum = 0
        for chunk in chunks:
            data = np.ascontiguousarray(chunk).reshape(-1).view(np.uint8)
            self._spool.write(data.data)
            size_bytes += data.nbytes
            checksum = zlib.crc32(data.data, checksum)
        self._table.add_plain(name, checksum)
        self.entries.append(StoredEntry(name, dtype, shape, size_bytes))
        return size_bytes

    def close(self) -> None:
        """Write the file, sync it to disk and give it its name."""
        temporary = self.path.with_name(self.path.name + ".tmp")
        try:
            self._flush_small()
            with temporary.open("wb") as out:
                out.write(layout.build_header(self.entries, self._metadata()))
                self._spool.seek(0)
                shutil.copyfileobj(self._spool, out, _COPY_BYTES)
                out.flush()
                os.fsync(out.fileno())
            temporary.replace(self.path)
        finally:
            temporary.unlink(missing_ok=True)
            self._spool.close()

    def _metadata(self) -> dict[str, str]:
        return {layout.FORMAT_KEY: "pt"} if self._ordinary else self._table.metadata()

    def _claim(self, name: str) -> None:
        if name in self._names:
            raise ValueError(f"{self.path}: two entries are called {name!r}")
        self._names.add(name)

    def _flush_small(self) -> None:
        for entry, array in self._small:
            self.entries.append(entry)
            self._spool.write(array.view(np.uint8).data)
        self._small.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        else:
            self._spool.close()
