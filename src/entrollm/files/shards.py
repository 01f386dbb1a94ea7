"""Find and open the files that hold a model's weights."""

from __future__ import annotations

import re
from pathlib import Path

from entrollm.errors import FormatError
from entrollm.files.contents import check_contents, check_names
from entrollm.files.safetensors import SafetensorsFile, open_safetensors, parse_json_object

_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_SHARD_PATTERN = re.compile(r"model-\d+-of-\d+\.safetensors")


def is_gguf(path: Path) -> bool:
    """Whether a path is a GGUF file, which holds a whole model."""
    return path.suffix.lower() == ".gguf" and path.is_file()


def open_weight_files(path: Path) -> dict[str, SafetensorsFile]:
    """Open the one weight file of a folder, or every shard that its index names.

    Returns:
        the files by name.
    Raises:
        FormatError: a file or the index is missing or malformed, or they do not agree.
        UnsupportedError: the folder holds other files in place of them; the message names them.
        ValueError: the folder holds GGUF files, which are models of their own.
    """
    index_path, single_path = path / _INDEX, path / _SINGLE
    if index_path.is_file():
        weight_map = _read_index(index_path)
        if single_path.is_file() and _SINGLE not in weight_map.values():
            raise FormatError(f"{path} has {_SINGLE} and an index that does not name it; remove the stale one")
        return _open_shards(path, weight_map)
    if single_path.is_file():
        return {_SINGLE: open_safetensors(single_path)}
    check_contents(path, str(path), has_safetensors=any(path.glob("*.safetensors")))
    check_names(path, (_SINGLE, _INDEX))
    raise FormatError(f"{path} has no weights: expected {_SINGLE}, or {_INDEX} and its shards")


def _read_index(index_path: Path) -> dict[str, str]:
    """The shard of each tensor, as the index maps it."""
    weight_map = parse_json_object(index_path, index_path.read_bytes(), "the index").get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise FormatError(f"{index_path}: weight_map must be an object that maps tensors to shards")
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or not shard.endswith(".safetensors") or Path(shard).name != shard:
            raise FormatError(f"{index_path}: tensor {name!r} is in {shard!r}, expected a .safetensors file's name")
    return weight_map


def _open_shards(path: Path, weight_map: dict[str, str]) -> dict[str, SafetensorsFile]:
    shards = sorted(set(weight_map.values()))
    missing = [shard for shard in shards if not (path / shard).is_file()]
    if missing:
        raise FormatError(f"{path}: shard {missing[0]} is missing, though the index names it; fetch it")
    stray = sorted(
        file.name for file in path.iterdir() if _SHARD_PATTERN.fullmatch(file.name) and file.name not in shards
    )
    if stray:
        raise FormatError(f"{path}: shard {stray[0]} is not in {_INDEX}; remove it, or fetch the index again")
    files = {shard: open_safetensors(path / shard) for shard in shards}
    owners: dict[str, str] = {}
    for shard, file in files.items():
        for name in file.tensors:
            if name in owners:
                raise FormatError(f"{path}: tensor {name!r} is in two shards, {owners[name]} and {shard}")
            owners[name] = shard
            if name not in weight_map:
                raise FormatError(f"{path}: tensor {name!r} of {shard} is not in {_INDEX}; fetch the index again")
    for name, shard in weight_map.items():
        if owners.get(name) != shard:
            found = f"it is in {owners[name]}" if name in owners else "no shard has it"
            raise FormatError(f"{path}: the index places tensor {name!r} in {shard}, but {found}; fetch both again")
    return files
