"""The tensors that the header of a compressed file lists: specs and checksums, in each version of the format."""

from __future__ import annotations

import base64
import binascii
import json
import re
import zlib
from collections.abc import Mapping
from typing import Any

from entrollm.errors import FormatError, UnsupportedError
from entrollm.files.safetensors import SafetensorsFile, parse_json_object
from entrollm.format import layout
from entrollm.format.grid import GridKind
from entrollm.format.spec import FORMAT_VERSION, READ_VERSIONS, TensorSpec
from entrollm.format.stored import StoredMatrix

_CRC32 = re.compile("[0-9a-f]{8}")
# What a table may take: a spec has some 1500 bytes and 60 quotes, and few matrices have no entry.
_TABLE_BYTES, _BYTES_PER_ENTRY = 1 << 20, 1 << 13
_TABLE_QUOTES, _QUOTES_PER_ENTRY = 1 << 17, 1 << 8
_CODED, _PLAIN = "coded", "plain"


class TensorTable:
    """The table of a file's tensors while the file is written; deflated as it grows, so that its size is known."""

    def __init__(self) -> None:
        self._deflate = zlib.compressobj(9)
        self._written = [self._deflate.compress(f'{{"{_CODED}":{{'.encode())]
        self._is_first = True
        self._has_plain = False

    def add_matrix(self, matrix: StoredMatrix) -> None:
        """Add the spec of a coded matrix.

        Raises:
            ValueError: a plain tensor was added before.
        """
        if self._has_plain:
            raise ValueError(f"{matrix.name}: coded matrices come before plain tensors")
        self._add(matrix.name, matrix.spec_text)

    def add_plain(self, name: str, checksum: int) -> None:
        """Add the CRC-32 of a plain tensor."""
        if not self._has_plain:
            self._begin_plain()
        self._add(name, f"{checksum:08x}")

    def stored_bytes(self, matrix: StoredMatrix) -> int:
        """What a matrix would add to the file, its share of the header included, to within a few bytes."""
        entries = sum(layout.entry_bytes(matrix.name, suffix, array) for suffix, array in matrix.entries.items())
        # Zeros stand for the checksum: its digits are noise, which the steps of later matrices should not depend on.
        item = self._item(matrix.name, layout.with_checksum(matrix.spec_text, 0))
        before, after = self._deflate.copy(), self._deflate.copy()
        added = after.compress(item) + after.flush()
        return entries + (len(added) - len(before.flush())) * 4 // 3

    def metadata(self) -> dict[str, str]:
        """The `__metadata__` of the file; nothing can be added after this call."""
        if not self._has_plain:
            self._begin_plain()
        self._written += [self._deflate.compress(b"}}"), self._deflate.flush()]
        table = base64.b64encode(b"".join(self._written)).decode()
        return {layout.FORMAT_KEY: "pt", layout.VERSION_KEY: str(FORMAT_VERSION), layout.TENSORS_KEY: table}

    def _begin_plain(self) -> None:
        self._written.append(self._deflate.compress(f'}},"{_PLAIN}":{{'.encode()))
        self._has_plain = self._is_first = True

    def _add(self, name: str, value: str) -> None:
        self._written.append(self._deflate.compress(self._item(name, value)))
        self._is_first = False

    def _item(self, name: str, value: str) -> bytes:
        return f"{'' if self._is_first else ','}{json.dumps(name)}:{json.dumps(value)}".encode()


def read_tensors(file: SafetensorsFile) -> tuple[dict[str, str], dict[str, int]]:
    """The spec texts of a file's coded matrices, and the CRC-32 of its plain tensors, both by name.

    Raises:
        FormatError: the header is malformed, or does not cover the file's entries.
        UnsupportedError: a newer version wrote the file.
    """
    version = file.metadata.get(layout.VERSION_KEY)
    if version is None:
        raise FormatError(f"{file.path}: its header has no {layout.VERSION_KEY!r}; it is not a compressed shard")
    if version not in map(str, READ_VERSIONS):
        raise UnsupportedError(f"{file.path}: format version {version!r}; this EntroLLM reads {versions_read()}")
    texts, checksums = _read_version_1(file) if _is_version_1(file) else _read_table(file)
    for name, value in checksums.items():
        if not isinstance(value, str) or _CRC32.fullmatch(value) is None:
            raise FormatError(f"{file.path}: the CRC-32 of {name!r} must be 8 hex digits, found {value!r:.80}")
    plain = {name: int(value, 16) for name, value in checksums.items()}
    _check_cover(file, texts, plain)
    return texts, plain


def parse_specs(file: SafetensorsFile, texts: Mapping[str, str]) -> dict[str, TensorSpec]:
    """The specs of a file's coded matrices.

    Raises:
        FormatError: a text is not a spec of the file's version.
    """
    specs = {name: TensorSpec.from_json(text, f"{file.path}: {name}") for name, text in texts.items()}
    for name, spec in specs.items():
        if spec.parts is None and isinstance(spec.kind, GridKind) and spec.kind.stored:
            raise FormatError(f"{file.path}: {name}: its spec declares stored scales, but no parts that hold them")
        if spec.parts is not None and _is_version_1(file):
            raise FormatError(f"{file.path}: {name}: its spec has parts, which format version 1 does not have")
        if spec.has_trellis and _is_version_1(file):
            raise FormatError(f"{file.path}: {name}: its spec has a trellis, which format version 1 does not have")
    return specs


def versions_read() -> str:
    """The versions that can be read, as words of a message."""
    return " and ".join(map(str, READ_VERSIONS))


def _is_version_1(file: SafetensorsFile) -> bool:
    return file.metadata[layout.VERSION_KEY] == "1"


def _read_version_1(file: SafetensorsFile) -> tuple[dict[str, str], dict[str, Any]]:
    """In version 1, the metadata has the spec of each matrix under its name."""
    text = file.metadata.get(layout.PLAIN_KEY)
    if text is None:
        raise FormatError(f"{file.path}: its header has no {layout.PLAIN_KEY!r}")
    checksums = parse_json_object(file.path, text.encode(), layout.PLAIN_KEY)
    return {name: text for name, text in file.metadata.items() if name not in layout.RESERVED_KEYS}, checksums


def _read_table(file: SafetensorsFile) -> tuple[dict[str, str], dict[str, Any]]:
    """In version 2, one deflated JSON object has all specs and checksums."""
    if unknown := sorted(file.metadata.keys() - {layout.FORMAT_KEY, layout.VERSION_KEY, layout.TENSORS_KEY}):
        raise FormatError(f"{file.path}: its header has the unknown key {unknown[0]!r:.80}")
    stored = file.metadata.get(layout.TENSORS_KEY)
    if stored is None:
        raise FormatError(f"{file.path}: its header has no {layout.TENSORS_KEY!r}")
    decompressor = zlib.decompressobj()
    most_bytes = _TABLE_BYTES + _BYTES_PER_ENTRY * len(file.tensors)
    try:
        text = decompressor.decompress(base64.b64decode(stored, validate=True), most_bytes)
    except (binascii.Error, ValueError, zlib.error) as error:
        raise FormatError(f"{file.path}: {layout.TENSORS_KEY} is not deflated base64: {error}") from None
    if not decompressor.eof or decompressor.unused_data:
        raise FormatError(
            f"{file.path}: {layout.TENSORS_KEY} is not one deflated stream of at most {most_bytes} bytes, which "
            f"{len(file.tensors)} entries need at most"
        )
    if text.count(b'"') > _TABLE_QUOTES + _QUOTES_PER_ENTRY * len(file.tensors):
        raise FormatError(
            f"{file.path}: {layout.TENSORS_KEY} lists far more than the file's {len(file.tensors)} entries"
        )
    table = parse_json_object(file.path, text, layout.TENSORS_KEY)
    if table.keys() != {_CODED, _PLAIN} or not all(isinstance(part, dict) for part in table.values()):
        raise FormatError(f"{file.path}: {layout.TENSORS_KEY} must hold the objects {_CODED!r} and {_PLAIN!r}")
    for name, spec in table[_CODED].items():
        if not isinstance(spec, str):
            raise FormatError(f"{file.path}: the spec of {name!r} must be a string, found {spec!r:.80}")
    return table[_CODED], table[_PLAIN]


def _check_cover(file: SafetensorsFile, coded: Mapping[str, str], plain: Mapping[str, int]) -> None:
    """Check that every entry is a plain tensor or belongs to one coded matrix."""
    for name in plain:
        if name not in file.tensors:
            raise FormatError(f"{file.path}: tensor {name!r} is listed but not stored")
    suffixes = layout.VERSION_1_SUFFIXES if _is_version_1(file) else layout.VERSION_2_SUFFIXES
    owned = {name + suffix for name in coded for suffix in suffixes}
    claimed = {name + suffix for name in coded for suffix in layout.SUFFIXES}
    for name in file.tensors:
        if name in coded or (name in plain and name in claimed):
            raise FormatError(f"{file.path}: {name!r} is stored both coded and plain")
        if name not in plain and name not in owned:
            raise FormatError(f"{file.path}: the entry {name!r} belongs to no tensor that the header describes")
