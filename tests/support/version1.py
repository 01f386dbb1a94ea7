"""Files of format version 1, which are read but no longer written: an entry for each array, a spec for each key."""

from __future__ import annotations

import dataclasses
import json
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from entrollm.format import layout
from entrollm.format.layout import FileEntry
from entrollm.format.spec import TensorSpec


class Version1Writer:
    """What `format.writer.ShardWriter` was: coded matrices first, then plain tensors."""

    def __init__(self, path: Path) -> None:
        self.entries: list[FileEntry] = []
        self._path = path
        self._specs: dict[str, str] = {}
        self._plain: dict[str, str] = {}
        self._streams: list[tuple[FileEntry, bytes]] = []
        self._others: list[tuple[FileEntry, bytes]] = []

    def add_matrix(self, name: str, spec: TensorSpec, arrays: Mapping[str, NDArray[Any]]) -> None:
        """Add a coded matrix; empty arrays are left out."""
        stored = {suffix: arrays[suffix] for suffix in layout.SUFFIXES if suffix in arrays and arrays[suffix].size}
        spec = dataclasses.replace(spec, checksum=layout.checksum(name, spec.to_json(), stored))
        for suffix, array in stored.items():
            entry = FileEntry(name + suffix, layout.entry_dtype(suffix, array), array.shape, array.nbytes)
            where = self._streams if suffix in layout.STREAMS else self._others
            where.append((entry, array.tobytes()))
        self._specs[name] = spec.to_json()

    def add_plain(self, name: str, dtype: str, shape: tuple[int, ...], chunks: Iterable[NDArray[Any]]) -> None:
        """Add a tensor in its own type."""
        data = b"".join(np.ascontiguousarray(chunk).tobytes() for chunk in chunks)
        self._plain[name] = f"{zlib.crc32(data):08x}"
        self._others.append((FileEntry(name, dtype, shape, len(data)), data))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        plain = json.dumps(self._plain, separators=(",", ":"))
        metadata = {"format": "pt", layout.VERSION_KEY: "1", layout.PLAIN_KEY: plain, **self._specs}
        contents = [*self._streams, *self._others]
        self.entries = [entry for entry, _ in contents]
        header = layout.build_header(self.entries, metadata)
        self._path.write_bytes(header + b"".join(data for _, data in contents))
