"""Split GGUF files: NAME-00001-of-0000N.gguf and its siblings, read as one.

Only the first part has the metadata of the model. Each has `split.no` (from 0) and `split.count`, and the first
`split.tensors.count`, the number of tensors of all parts.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from types import MappingProxyType
from typing import Any

from numpy.typing import NDArray

from entrollm.errors import FormatError
from entrollm.files.gguf import GgufFile, open_gguf

_NAME = re.compile(r"(?P<stem>.*)-(?P<number>\d{5})(?P<of>-of-)(?P<count>\d{5})(?P<suffix>\.gguf)", re.IGNORECASE)
_COUNT, _NUMBER, _TENSORS = "split.count", "split.no", "split.tensors.count"


class GgufParts(GgufFile):
    """The parts of a split file behind the interface of one; made by `open_gguf_parts`."""

    def __init__(self, parts: Sequence[GgufFile]) -> None:
        self.path = parts[0].path
        self.parts = tuple(parts)
        self.metadata = parts[0].metadata
        self.size_bytes = sum(part.size_bytes for part in parts)
        self._owners: dict[str, GgufFile] = {}
        for part in parts:
            for name in part.tensors:
                if name in self._owners:
                    raise FormatError(f"{part.path}: tensor {name!r:.80} is in {self._owners[name].path.name} too")
                self._owners[name] = part
        self.tensors = MappingProxyType({name: part.tensors[name] for name, part in self._owners.items()})

    def array(self, name: str) -> NDArray[Any]:
        """A read-only view of a tensor, as GgufFile.array."""
        return self._owners[name].array(name)

    def release(self, name: str) -> None:
        """Tell the system that a tensor's pages need not stay resident; views stay valid."""
        self._owners[name].release(name)

    def close(self) -> None:
        """Close the files; they are unmapped when the last view is gone."""
        for part in self.parts:
            part.close()


def open_gguf_parts(path: Path) -> GgufFile:
    """Open a GGUF file, and the other parts of it if it is the first of several.

    Raises:
        FormatError: the file is a later part, or a part is missing, malformed, or not of this file; the message names
            it.
        UnsupportedError: the version or the type of a tensor is not supported.
        OSError: a file cannot be opened.
    """
    first = open_gguf(path)
    count = _integer(first, _COUNT) or 1
    if count == 1:
        return first
    match = _NAME.fullmatch(path.name)
    if match is None or int(match["count"]) != count:
        raise FormatError(
            f"{path}: it is one of several parts ({_COUNT} is {count!r:.40}), but its name does not end in "
            "-00001-of-0000N.gguf; rename the parts, or join them with `llama-gguf-split --merge`"
        )
    paths = [
        path.with_name(f"{match['stem']}-{i + 1:05d}{match['of']}{count:05d}{match['suffix']}") for i in range(count)
    ]
    if int(match["number"]) != 1:
        raise FormatError(f"{path}: it is a later part of a model; name the first part, {paths[0].name}")
    with ExitStack() as opened:
        parts = []
        for number, part in enumerate(paths):
            if not part.is_file():
                raise FormatError(f"{part}: part {number + 1} of {count} is missing; fetch it into the same folder")
            parts.append(first if number == 0 else open_gguf(part))
            opened.callback(parts[-1].close)
            found = _integer(parts[-1], _NUMBER), _integer(parts[-1], _COUNT)
            if found != (number, count):
                raise FormatError(
                    f"{part}: {_NUMBER} and {_COUNT} are {found[0]!r:.40} and {found[1]!r:.40}, expected {number} and "
                    f"{count}; it is a part of another file"
                )
            _check_same_model(first, parts[-1])
        whole = GgufParts(parts)
        expected = _integer(first, _TENSORS, len(whole.tensors))
        if expected != len(whole.tensors):
            raise FormatError(
                f"{path}: {_TENSORS} is {expected!r:.40}, but the {count} parts have {len(whole.tensors)} tensors; "
                "fetch them again"
            )
        opened.pop_all()
        return whole


def _check_same_model(first: GgufFile, part: GgufFile) -> None:
    """Check that what a later part says of the model, which is seldom anything, is what the first one says.

    Raises:
        FormatError: it is not.
    """
    for key in part.metadata.keys() & first.metadata.keys() - {_COUNT, _NUMBER, _TENSORS}:
        ours, theirs = first.metadata[key], part.metadata[key]
        if ours != theirs:
            raise FormatError(
                f"{part.path}: {key} is {theirs!r:.40}, and {ours!r:.40} in {first.path.name}; it is a part of another "
                "file"
            )


def _integer(file: GgufFile, key: str, default: int | None = None) -> int | None:
    """A number of the metadata; the default if it is not there."""
    value = file.metadata.get(key, default)
    if value is not None and type(value) is not int:
        raise FormatError(f"{file.path}: {key} is {value!r:.40}, expected an integer; fetch or split the file again")
    return value
