"""Checksums of what the checksums of tensors do not cover: a folder's small files, and the headers of its shards."""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path, PurePosixPath

from entrollm.errors import CorruptStreamError, FormatError, Message
from entrollm.files.contents import check_is_file
from entrollm.files.safetensors import header_bytes, parse_json_object
from entrollm.format.json_fields import is_int

CHECKSUMS_NAME = "entrollm_checksums.json"
_FILES, _HEADERS = "files", "headers"
_SIZE, _CRC = "bytes", "crc32"
_MOST_BYTES = 2**63
_CHUNK_BYTES = 1 << 20
_CRC32 = re.compile("[0-9a-f]{8}")


def checksums_text(folder: Path, names: Iterable[str]) -> str:
    """The checksums file of a folder.

    Args:
        folder: a folder that is complete but for this file.
        names: the small files to cover, as paths in it.
    Returns:
        JSON with the size and the CRC-32 of these files, and the CRC-32 of the header of every shard.
    """
    files = {name: _item(folder / name, _of_file) for name in sorted(names)}
    headers = {path.name: _item(path, _of_header) for path in sorted(folder.glob("*.safetensors"))}
    return json.dumps({_FILES: files, _HEADERS: headers}, indent=1) + "\n"


def check_files(folder: Path) -> None:
    """Compare a folder's small files and headers with their checksums.

    Folders without checksums pass, and so do files that were removed, and small files that have another size: these
    were edited, since damage leaves sizes as they are.

    Raises:
        FormatError: the checksums file is malformed.
        CorruptStreamError: a file differs; the message names it.
    """
    path = folder / CHECKSUMS_NAME
    if not path.exists():
        return
    check_is_file(path)
    listed = parse_json_object(path, path.read_bytes(), "the list of checksums")
    if listed.keys() != {_FILES, _HEADERS} or not all(isinstance(part, dict) for part in listed.values()):
        raise FormatError(f"{path}: expected the objects {_FILES!r} and {_HEADERS!r}; fetch the file again")
    for name, value in listed[_FILES].items():
        _check(path, name, value, _of_file)
    for name, value in listed[_HEADERS].items():
        _check(path, name, value, _of_header)


def _check(path: Path, name: str, value: object, checksum: Callable[[Path], int]) -> None:
    parts = PurePosixPath(name).parts
    if not parts or parts[0] == "/" or ".." in parts or "\\" in name or "\0" in name:
        raise FormatError(f"{path}: {name!r:.80} is not a file of the folder; fetch {path.name} again")
    if not isinstance(value, dict) or value.keys() != {_SIZE, _CRC} or not is_int(value[_SIZE], 0, _MOST_BYTES):
        raise FormatError(f"{path}: {name!r} must have the integer {_SIZE} and {_CRC}, found {value!r:.80}")
    expected = value[_CRC]
    if not isinstance(expected, str) or _CRC32.fullmatch(expected) is None:
        raise FormatError(f"{path}: the CRC-32 of {name!r} must be 8 hex digits, found {expected!r:.80}")
    file = path.parent / name
    if not file.exists():
        return
    check_is_file(file)
    hint = Message("if you changed it yourself, remove its line from {}", path.name)
    if (size := file.stat().st_size) != value[_SIZE]:
        if checksum is _of_file:
            return
        raise CorruptStreamError(
            f"{file}: it has {size} bytes, {path.name} has {value[_SIZE]}; it is damaged or belongs to another "
            "compression, compress or fetch the folder again",
            hint=hint,
        )
    found = checksum(file)
    if found != int(expected, 16):
        what = "its header has" if checksum is _of_header else "it has"
        raise CorruptStreamError(
            f"{file}: {what} CRC-32 {found:08x}, {path.name} has {expected}; "
            "the file is damaged, compress or fetch it again",
            hint=hint,
        )


def _item(path: Path, checksum: Callable[[Path], int]) -> dict[str, int | str]:
    return {_SIZE: path.stat().st_size, _CRC: f"{checksum(path):08x}"}


def _of_file(path: Path) -> int:
    value = 0
    with path.open("rb") as stream:
        while chunk := stream.read(_CHUNK_BYTES):
            value = zlib.crc32(chunk, value)
    return value


def _of_header(path: Path) -> int:
    return zlib.crc32(header_bytes(path))
