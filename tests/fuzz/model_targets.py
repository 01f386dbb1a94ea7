"""Models whose configuration does not fit their tensors, and caches that do not fit their model."""

from __future__ import annotations

import json
import random
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from entrollm.checkpoint.names import text_names
from entrollm.engine.cache_file import restore_cache, save_cache
from entrollm.engine.decoder import Decoder
from entrollm.files.safetensors import open_safetensors
from entrollm.models import read_config
from entrollm.models.config_fields import Fields
from tests.engine.architectures import ARCHITECTURES
from tests.engine.dense import DenseWeights, read_tensors
from tests.fuzz.mutate import mutate_json, mutate_text, to_text
from tests.fuzz.target import Target, write

_CACHE = "prompt.cache"
# One of each kind of part.
_KINDS = ("phi3-longrope", "gemma3", "gpt2", "gpt_oss", "deepseek_v3", "qwen3_5", "lfm2", "nemotron_h")


class _Models:
    """The configurations of some architectures, and their tensors."""

    def __init__(self) -> None:
        self._tensors: dict[str, dict[str, Any]] = {}

    def prepare(self, folder: Path) -> list[Any]:
        seeds = []
        for name in _KINDS:
            place = folder / name
            place.mkdir()
            ARCHITECTURES[name](place)
            tensors = read_tensors(place)
            self._tensors[name] = {key: tensors[theirs] for key, theirs in text_names(tensors).items()}
            seeds.append((name, json.loads((place / "config.json").read_text())))
        return seeds

    def mutate(self, folder: Path, seed: tuple[str, Any], generator: random.Random) -> None:
        """Change the configuration, and seldom leave out, transpose or reshape a tensor."""
        name, config = seed
        changed = generator.choice(sorted(self._tensors[name])) if not generator.randrange(4) else None
        if changed is None or generator.randrange(2):
            config = mutate_json(config, generator)
        how = generator.choice(("none", "transposed", "flat", "longer", "shorter", "scalar"))
        write(folder / "model.json", to_text([name, config, changed, how]))

    def read(self, folder: Path) -> None:
        name, config, changed, how = json.loads((folder / "model.json").read_text())
        tensors = dict(self._tensors[name])
        if changed is not None:
            array = tensors.pop(changed)
            if how != "none":
                tensors[changed] = _reshaped(array, how)
        decoder = Decoder(read_config(Fields(config, "config.json")), DenseWeights(tensors))
        cache = decoder.new_cache()
        for ids in ([1, 2, 3], [4]):
            decoder.forward(np.array(ids), cache)


def _reshaped(array: Any, how: str) -> Any:
    """A tensor of another shape; those of the weights that stand in for files stay matrices."""
    if how == "transposed":
        return np.ascontiguousarray(array.T)
    if how == "flat" and array.ndim != 2:
        return array.reshape(-1)
    if how == "scalar" and array.ndim != 2:
        return array.reshape(-1)[0].reshape(())
    if how == "longer":
        return np.concatenate([array, array[:1]])
    return array[:-1]


class _Caches:
    """The caches of some architectures in files."""

    def __init__(self) -> None:
        self._decoders: dict[str, Decoder] = {}

    def prepare(self, folder: Path) -> list[Any]:
        seeds = []
        for name, cache_type in (("phi3-longrope", "int8"), ("gemma3", "f16"), ("nemotron_h", "f32")):
            place = folder / name
            place.mkdir()
            ARCHITECTURES[name](place)
            tensors = read_tensors(place)
            weights = DenseWeights({key: tensors[theirs] for key, theirs in text_names(tensors).items()})
            config = read_config(Fields(json.loads((place / "config.json").read_text()), "config.json"))
            self._decoders[name] = decoder = Decoder(config, weights, cache_type)
            cache = decoder.new_cache()
            decoder.forward(np.array([1, 2, 3, 4]), cache)
            save_cache(folder / _CACHE, cache, name)
            with open_safetensors(folder / _CACHE) as file:
                arrays = {key: file.array(key).copy() for key in file.tensors}
                seeds.append((name, dict(file.metadata), arrays))
        return seeds

    def mutate(self, folder: Path, seed: tuple[str, Any, dict[str, Any]], generator: random.Random) -> None:
        """Change arrays and mostly the checksum with them, or what is said of them, or seldom the whole file."""
        name, metadata, arrays = seed
        write(folder / "kind", name.encode())
        arrays = dict(arrays)
        kind = generator.randrange(8)
        if kind < 5:
            changed = generator.choice(sorted(arrays))
            arrays[changed] = _other(arrays[changed], generator)
        if kind == 4:
            arrays[generator.choice(("x", "layers.0.x", "layers.9.keys", "ids "))] = arrays.pop(changed)
        if kind == 5:
            arrays.pop(generator.choice(sorted(arrays)))
        metadata = {**metadata, "crc32": f"{_checksum(arrays):08x}"}
        if kind == 6:
            changes = mutate_json(metadata, generator).items()
            metadata = {str(key).encode("ascii", "replace").decode(): ascii(value) for key, value in changes}
        save_file(arrays, folder / _CACHE, metadata)
        if kind == 7:
            content = (folder / _CACHE).read_bytes()
            write(folder / _CACHE, mutate_text(content, generator))

    def read(self, folder: Path) -> None:
        name = (folder / "kind").read_text()
        decoder = self._decoders[name]
        cache = decoder.new_cache()
        restore_cache(folder / _CACHE, cache, name, decoder.config.vocab_size)
        known = cache.reuse([1, 2, 3, 4, 5])
        decoder.forward(np.array([1, 2, 3, 4, 5][known:]), cache)


def _other(array: Any, generator: random.Random) -> Any:
    """An array of the same, or another, shape or type, perhaps with other values."""
    kind = generator.randrange(7)
    if kind == 0:
        return np.ascontiguousarray(array.T)
    if kind == 1:
        return array[..., :-1].copy()
    if kind == 2:
        return array.reshape(-1)[:0].copy() if generator.randrange(2) else np.array(array.reshape(-1)[0])
    if kind == 3:
        return array.astype(generator.choice((np.float32, np.float16, np.int8, np.int64, np.uint8)))
    if kind == 4:
        return np.concatenate([array, array])
    values = array.reshape(-1).copy()
    if values.size:
        top = np.finfo(values.dtype).max if values.dtype.kind == "f" else np.iinfo(values.dtype).max
        values[generator.randrange(values.size)] = generator.choice((0, 1, -1, top, -top))
    return values.reshape(array.shape)


def _checksum(arrays: Mapping[str, Any]) -> int:
    """What a cache says of its arrays, so that other checks are reached."""
    checksum = 0
    for name in sorted(arrays):
        checksum = zlib.crc32(f"{name} {arrays[name].shape}".encode(), checksum)
        checksum = zlib.crc32(arrays[name].tobytes(), checksum)
    return checksum


_MODELS, _CACHES = _Models(), _Caches()
MODEL_TARGETS: Mapping[str, Target] = {
    "models": Target(_MODELS.prepare, _MODELS.mutate, _MODELS.read),
    "cache": Target(_CACHES.prepare, _CACHES.mutate, _CACHES.read),
}
