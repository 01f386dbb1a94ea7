"""Caches of long prompts in files: safetensors with the layers' keys, values and states, a checksum, and the model's
fingerprint."""

from __future__ import annotations

import os
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from entrollm.engine.cache import Cache
from entrollm.engine.layer_cache import LayerCache
from entrollm.engine.state import RecurrentState
from entrollm.errors import CorruptStreamError, FormatError
from entrollm.files.dtypes import DTYPES
from entrollm.files.safetensors import SafetensorsFile, open_safetensors
from entrollm.format.layout import FileEntry, build_header
from entrollm.system import replacing, sync_folder

_FORMAT = "entrollm cache 2"
_IDS = "ids"
# Which of longrope's frequencies the keys were rotated with; a beginning of a long sequence keeps the long ones.
_ROTATIONS = {False: "short", True: "long"}


def save_cache(path: Path, cache: Cache, fingerprint: str) -> None:
    """Write a cache beside `path`, in a new file of the user's own, and give it this name when it is complete.

    Args:
        path: the file, which is replaced if there is one.
        cache: of a sequence.
        fingerprint: of the model.
    Raises:
        ValueError: the cache is empty.
        OSError: it cannot be written.
    """
    if not cache.ids:
        raise ValueError(f"{path}: the cache holds no tokens; run the model on a prompt first, with prefill")
    arrays: dict[str, NDArray[Any]] = {_IDS: np.array(cache.ids, dtype=np.int64)}
    for number, layer in enumerate(cache.layers):
        if isinstance(layer, LayerCache | RecurrentState):
            arrays |= {f"layers.{number}.{name}": array for name, array in layer.arrays().items()}
    packed = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    types = {dtype: name for name, dtype in DTYPES.items()}
    entries = [FileEntry(name, types[array.dtype], array.shape, array.nbytes) for name, array in packed.items()]
    metadata = {
        "format": _FORMAT,
        "model": fingerprint,
        "cache_type": cache.cache_type,
        "rotations": _ROTATIONS[cache.is_long],
        "crc32": f"{_checksum(packed):08x}",
    }
    # This user alone can read it, since a prompt may be private.
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0)
    with replacing(path) as temporary, os.fdopen(os.open(temporary, flags, 0o600), "wb") as out:
        out.write(build_header(entries, metadata))
        for array in packed.values():
            out.write(array.reshape(-1).view(np.uint8).data)
        out.flush()
        os.fsync(out.fileno())
    sync_folder(path.resolve().parent)


def restore_cache(path: Path, cache: Cache, fingerprint: str, vocab_size: int) -> None:
    """Fill an empty cache from a file.

    Args:
        path: the file.
        cache: an empty one of the model.
        fingerprint: of the model.
        vocab_size: token ids that it has.
    Raises:
        FormatError: the file is no cache, one of another model or type, or its arrays do not fit the model.
        CorruptStreamError: its bytes differ from their checksum.
        OSError: it cannot be read.
    """
    with _open_cache(path) as file:
        _check_metadata(file, cache, fingerprint)
        arrays = {name: file.array(name) for name in file.tensors}
        if (found := f"{_checksum(arrays):08x}") != file.metadata.get("crc32"):
            raise CorruptStreamError(
                f"{path}: its arrays have CRC-32 {found}, expected {file.metadata.get('crc32')}; delete the file"
            )
        ids = arrays.pop(_IDS, None)
        if ids is None or ids.dtype != np.int64 or ids.ndim != 1 or len(ids) == 0:
            raise FormatError(f"{path}: expected token ids as one axis of I64; delete the file")
        if ids.min() < 0 or ids.max() >= vocab_size:
            raise FormatError(f"{path}: a token id is outside the vocabulary of {vocab_size}; delete the file")
        for number, layer in enumerate(cache.layers):
            if not isinstance(layer, LayerCache | RecurrentState):
                continue
            prefix = f"layers.{number}."
            names = [name for name in arrays if name.startswith(prefix)]
            try:
                layer.restore(len(ids), {name.removeprefix(prefix): arrays.pop(name) for name in names})
            except ValueError as error:
                raise FormatError(f"{path}: layer {number}: {error}; delete the file") from None
        if arrays:
            raise FormatError(f"{path}: {min(arrays)!r} is not part of the cache of this model; delete the file")
        cache.ids = ids.tolist()
        cache.is_long = file.metadata["rotations"] == _ROTATIONS[True]


def _open_cache(path: Path) -> SafetensorsFile:
    """Open the file.

    Raises:
        FormatError: it is no safetensors file.
    """
    try:
        return open_safetensors(path)
    except FormatError as error:
        raise FormatError(f"{path} is not a cache, or is damaged; delete it, or name another file ({error})") from None


def _check_metadata(file: SafetensorsFile, cache: Cache, fingerprint: str) -> None:
    found = file.metadata
    if found.get("format") != _FORMAT:
        raise FormatError(f"{file.path}: expected a cache ({_FORMAT}), found format {found.get('format')!r:.40}")
    if found.get("model") != fingerprint:
        raise FormatError(
            f"{file.path} is the cache of another model ({found.get('model', ''):.16}, this one is {fingerprint:.16}); "
            "name another file, or delete it"
        )
    if found.get("cache_type") != cache.cache_type:
        raise FormatError(
            f"{file.path} holds keys and values as {found.get('cache_type')!r:.20}, and {cache.cache_type} is asked "
            "for; name another file, or delete it"
        )
    if found.get("rotations") not in _ROTATIONS.values():
        raise FormatError(
            f"{file.path}: expected rotations that are short or long, found {found.get('rotations')!r:.20}; delete the "
            "file"
        )


def _checksum(arrays: Mapping[str, NDArray[Any]]) -> int:
    """CRC-32 of all arrays in the order of their names, with their names and shapes."""
    checksum = 0
    for name in sorted(arrays):
        array = arrays[name]
        checksum = zlib.crc32(f"{name} {array.shape}".encode(), checksum)
        checksum = zlib.crc32(array.reshape(-1).view(np.uint8).data, checksum)
    return checksum
