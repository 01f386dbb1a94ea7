"""Open a compressed model folder: check every structure once, and leave the code bytes in the memory map."""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from entrollm import _core
from entrollm.errors import CorruptStreamError, FormatError, UnsupportedError
from entrollm.files.contents import check_contents
from entrollm.files.safetensors import SafetensorsFile, parse_json_object
from entrollm.files.shards import open_weight_files
from entrollm.format import layout
from entrollm.format.checksums import check_files
from entrollm.format.entry import split_entries
from entrollm.format.header import parse_specs, read_tensors, versions_read
from entrollm.format.spec import READ_VERSIONS, TensorSpec


class CompressedModel:
    """A folder that `entrollm compress` wrote, open for reading; made by `CompressedModel.open`.

    Attributes:
        path, config: the folder and its config.json.
        specs: the coded matrices by name.
        plain: names of the tensors that kept their type.
    """

    def __init__(self, path: Path, config: dict[str, Any], files: Mapping[str, SafetensorsFile]) -> None:
        self.path = path
        self.config = config
        self._files: dict[str, SafetensorsFile] = {}
        self._spec_texts: dict[str, str] = {}
        specs: dict[str, TensorSpec] = {}
        plain: dict[str, int] = {}
        for file in files.values():
            coded, kept = read_tensors(file)
            specs.update(parse_specs(file, coded))
            plain.update(kept)
            self._spec_texts.update(coded)
            for name in [*coded, *file.tensors]:
                if self._files.setdefault(name, file) is not file:
                    raise FormatError(f"{path}: tensor {name!r} is in two shards")
        self.specs: Mapping[str, TensorSpec] = MappingProxyType(specs)
        self.plain = tuple(plain)
        self._plain_checksums = plain

    @classmethod
    def open(cls, path: str | Path, *, check: bool = True, restores: bool = False) -> Self:
        """Open a compressed model folder.

        Args:
            path: the folder.
            check: compare the small files and the headers with their checksums; those of tensors are compared by
                `check_checksum`.
            restores: whether the folder may hold differences to a base, which alone do not make a model.
        Raises:
            FormatError: the folder, a shard or a spec is malformed, or a file differs from its checksum; the message
                names it.
            UnsupportedError: a newer version wrote the folder, or it holds differences to a base.
            ValueError: the path is not a folder of a compressed model.
        """
        path = Path(path)
        if check:
            check_files(path)
        config = read_config(path)
        if not is_compressed(config):
            raise ValueError(f"{path} is not a compressed model; `entrollm compress {path} -o OUT` makes one")
        version = config["quantization_config"].get("version")
        if type(version) is not int or version not in READ_VERSIONS:
            raise UnsupportedError(
                f"{path / 'config.json'}: format version {version!r}; this EntroLLM reads {versions_read()}"
            )
        if not restores and (path / layout.DIFFERENCE_NAME).exists():
            raise UnsupportedError(
                f"{path} holds the differences of a model to its base; restore it first, with `entrollm export {path} "
                "-o MODEL --base BASE`"
            )
        return cls(path, config, open_weight_files(path))

    def matrix_arrays(self, name: str) -> dict[str, NDArray[Any]]:
        """The arrays of a matrix by suffix, whether one entry holds them or each has its own.

        Raises:
            FormatError: the entries do not match the spec.
        """
        return split_entries(name, self.specs[name], self.entries(name))

    def array(self, name: str) -> NDArray[Any]:
        """A plain tensor as a read-only view of the file."""
        return self._files[name].array(name)

    def dtype(self, name: str) -> str:
        """The type of a plain tensor, by its safetensors name."""
        return self._files[name].tensors[name].dtype

    def entries(self, name: str) -> dict[str, NDArray[Any]]:
        """The entries of a matrix by suffix, as read-only views of the file.

        Raises:
            FormatError: an entry has the wrong type or is empty.
        """
        file = self._files[name]
        arrays: dict[str, NDArray[Any]] = {}
        for suffix in layout.SUFFIXES:
            entry = file.tensors.get(name + suffix)
            if entry is None:
                continue
            if entry.dtype not in layout.SUFFIX_DTYPES[suffix] or len(entry.shape) != 1:
                raise FormatError(
                    f"{file.path}: {name + suffix!r} is {entry.dtype} {list(entry.shape)}, "
                    f"expected one axis of {' or '.join(layout.SUFFIX_DTYPES[suffix])}"
                )
            if entry.size_bytes <= (_core.SLACK_BYTES if suffix in layout.STREAMS else 0):
                raise FormatError(f"{file.path}: {name + suffix!r} is empty; empty entries are left out")
            arrays[suffix] = file.array(name + suffix)
        return arrays

    def are_equal(self, first: str, second: str) -> bool:
        """Whether two coded matrices are stored in the same way, byte for byte, so that they have the same values.

        Raises:
            KeyError: one of them is not a coded matrix.
        """
        specs = [replace(self.specs[name], relative_error=0.0, checksum=0) for name in (first, second)]
        ours, theirs = self.entries(first), self.entries(second)
        return (
            specs[0] == specs[1]
            and ours.keys() == theirs.keys()
            and all(np.array_equal(ours[suffix], theirs[suffix]) for suffix in ours)
        )

    def check_checksum(self, name: str) -> None:
        """Compare the bytes of a coded matrix or a plain tensor with their checksum.

        Raises:
            KeyError: no tensor has this name.
            CorruptStreamError: they differ.
        """
        if name in self.specs:
            expected = self.specs[name].checksum
            found = layout.checksum(name, self._spec_texts[name], self.entries(name))
        else:
            expected = self._plain_checksums[name]
            found = zlib.crc32(self.array(name).reshape(-1).view(np.uint8).data)
        if found != expected:
            raise CorruptStreamError(
                f"{self._files[name].path}: the bytes of {name!r} have CRC-32 {found:08x}, expected {expected:08x}; "
                "the file is damaged, compress or fetch it again"
            )

    def fingerprint(self) -> str:
        """What differs between models: a hash of the configuration and of all checksums, in hexadecimal."""
        sums = {name: spec.checksum for name, spec in self.specs.items()} | self._plain_checksums
        text = json.dumps([self.config, sorted(sums.items())], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    def file_bytes(self) -> int:
        """Bytes of all weight files, headers included."""
        return sum(file.size_bytes for file in {id(f): f for f in self._files.values()}.values())

    def release(self, name: str) -> None:
        """Tell the system that the bytes of a coded matrix or a plain tensor need not stay resident."""
        for entry in self._stored(name):
            self._files[name].release(entry)

    def prefetch(self, name: str) -> None:
        """Tell the system to read the bytes of a coded matrix or a plain tensor, and go on."""
        for entry in self._stored(name):
            self._files[name].prefetch(entry)

    def tensor_bytes(self, name: str) -> int:
        """What a coded matrix or a plain tensor takes in the file, without its share of the header."""
        return sum(self._files[name].tensors[entry].size_bytes for entry in self._stored(name))

    def _stored(self, name: str) -> list[str]:
        """The entries of a coded matrix or a plain tensor."""
        entries = self._files[name].tensors
        return [entry for entry in (name, *(name + suffix for suffix in layout.SUFFIXES)) if entry in entries]

    def close(self) -> None:
        """Close the files; matrices and views stay valid."""
        for file in self._files.values():
            file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def read_config(path: Path) -> dict[str, Any]:
    """The config.json of a model folder.

    Raises:
        FormatError: it is missing or malformed.
        UnsupportedError: the folder holds something else; the message names it.
        ValueError: the path is not a folder.
    """
    if not path.is_dir():
        if path.suffix.lower() == ".gguf" and path.is_file():
            raise ValueError(
                f"{path} is a GGUF file; `entrollm compress {path} -o OUT` makes a folder of it, then use OUT"
            )
        raise ValueError(f"{path} is {'a file' if path.exists() else 'missing'}; expected a model folder")
    config_path = path / "config.json"
    if not config_path.is_file():
        check_contents(path, f"{path} has no config.json; it")
        raise FormatError(f"{path} has no config.json; expected a model folder")
    return parse_json_object(config_path, config_path.read_bytes(), "the configuration")


def is_compressed(config: Mapping[str, Any]) -> bool:
    """Whether a config.json is that of a compressed model folder."""
    quantization = config.get("quantization_config")
    return isinstance(quantization, dict) and quantization.get("quant_method") == layout.QUANT_METHOD
