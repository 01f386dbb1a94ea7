"""Find and open the files that hold a model's weights."""

from __future__ import annotations

import re
from pathlib import Path

from entrollm.errors import FormatError, UnsupportedError
from entrollm.files.safetensors import SafetensorsFile, open_safetensors, parse_json_object

_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_SHARD_PATTERN = re.compile(r"model-\d+-of-\d+\.safetensors")


ADAPTER = (
    "an adapter (LoRA), which is not a whole model; merge it into the model that it was trained on, with "
    "peft's merge_and_unload and save_pretrained, and use that"
)


def is_gguf(path: Path) -> bool:
    """Whether a path is a GGUF file, which holds a whole model."""
    return path.suffix.lower() == ".gguf" and path.is_file()


def open_weight_files(path: Path) -> dict[str, SafetensorsFile]:
    """Open the one weight file of a folder, or every shard that its index names.

    Returns:
        the files by name.
    Raises:
        FormatError: a file or the index is missing or malformed, or they do not agree.
        UnsupportedError: the weights are PyTorch pickles.
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
    present = sorted(file.name for file in path.iterdir())
    if "adapter_model.safetensors" in present or "adapter_config.json" in present:
        raise UnsupportedError(f"{path} holds {ADAPTER}")
    consolidated = [name for name in present if name.startswith("consolidated") and name.endswith(".safetensors")]
    if consolidated:
        raise UnsupportedError(
            f"{path} holds {consolidated[0]}, weights in the layout of their maker's own tools; use the checkpoint in "
            "the layout of transformers, or convert it"
        )
    if any(name.endswith(".safetensors") for name in present):
        shards = ", ".join(name for name in present if name.endswith(".safetensors"))
        raise FormatError(f"{path} has neither {_SINGLE} nor {_INDEX}, only {shards}; fetch the index as well")
    pickles = [name for name in present if name.endswith((".bin", ".pth", ".pt"))]
    if pickles:
        raise UnsupportedError(
            f"{path} holds PyTorch pickles ({pickles[0]}), which can run code when they are read; convert them to "
            "safetensors: load with transformers and call save_pretrained"
        )
    gguf = [name for name in present if name.endswith(".gguf")]
    if gguf:
        raise ValueError(f"{path} holds GGUF files; name the file, such as {path / gguf[0]}")
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
