"""Present a GGUF file as a checkpoint, with Hugging Face's tensor names, row order and config.json."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from entrollm.checkpoint.gguf_architecture import Architecture
from entrollm.checkpoint.gguf_metadata import ROTATIONS, model_config
from entrollm.checkpoint.gguf_sources import Source, find_sources
from entrollm.errors import FormatError, Message, UnsupportedError
from entrollm.files.gguf import FLOAT_TYPES, GgufFile
from entrollm.files.gguf_parts import open_gguf_parts
from entrollm.files.safetensors import Entry
from entrollm.format import layout


class GgufTensors:
    """The tensors of a GGUF file, or of a part of one, under Hugging Face's names.

    Quantized ones are U8 (rows, bytes of a row). A tensor that is made of two belongs to the part with the first.

    Args:
        file: the whole file.
        part: the part.
        sources: what the tensors of the whole file are made of.
        heads: the heads of projections whose rows are in another order.

    Attributes:
        path, size_bytes: the part.
        tensors: the tensors by name.
    """

    def __init__(
        self,
        file: GgufFile,
        part: GgufFile,
        sources: Mapping[str, Source],
        heads: Mapping[str, int],
    ) -> None:
        self.path = part.path
        self.size_bytes = part.size_bytes
        self._file = file
        self._part = part
        self._sources = {name: source for name, source in sources.items() if source.name in part.tensors}
        self._heads = heads
        self.tensors: Mapping[str, Entry] = MappingProxyType(
            {name: source.entry(file) for name, source in self._sources.items()}
        )

    def array(self, name: str) -> NDArray[Any]:
        """A tensor as Hugging Face has it; a view, unless its values or its rows are in another order in the file."""
        array = self._sources[name].array(self._file)
        heads = next((n for part, n in self._heads.items() if f".{part}." in name), None)
        if heads is None:
            return array
        if len(array) % (2 * heads):
            raise FormatError(f"{self.path}: tensor {name!r} has {len(array)} rows, which {heads} heads do not share")
        # llama.cpp rotates neighbouring rows of a head together, transformers rows that are half a head apart.
        apart = array.reshape(heads, -1, 2, *array.shape[1:]).swapaxes(1, 2)
        return np.ascontiguousarray(apart).reshape(array.shape)

    def release(self, name: str) -> None:
        """Tell the system that a tensor's pages need not stay resident."""
        for theirs in self._sources[name].tensors:
            self._file.release(theirs)

    def close(self) -> None:
        """Close the file."""
        self._part.close()


def open_gguf_model(path: Path) -> tuple[dict[str, Any], dict[str, GgufTensors]]:
    """Open a GGUF file, or all parts of a split one.

    Returns:
        a config.json, whose quantization_config names the block type of each quantized tensor, and the tensors of each
        file by its name.
    Raises:
        FormatError: the file is malformed or lacks a value.
        UnsupportedError: its architecture, or an option of the architecture, is not implemented.
    """
    try:
        return _read(path, open_gguf_parts(path))
    except UnsupportedError as error:
        hint = "use the safetensors checkpoint that it was made from; compress takes every architecture of transformers"
        raise UnsupportedError(error.message, hint=Message(hint)) from None


def _read(path: Path, file: GgufFile) -> tuple[dict[str, Any], dict[str, GgufTensors]]:
    architecture, config = model_config(file)
    heads = {}
    if architecture.interleaves:
        heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
    sources = find_sources(file, architecture, ROTATIONS, architecture.changes(config))
    names = {name: source.name for name, source in sources.items()}
    _check_places(path, names, config, architecture)
    config |= _biases(path, names, config, architecture)
    _check_experts(path, file, sources, config)
    sources = {architecture.final_name(name, config): source for name, source in sources.items()}
    types, columns = {}, {}
    for name, source in sources.items():
        if (kind := source.type(file)) not in FLOAT_TYPES:
            shape = file.tensors[source.name].shape
            if len(shape) != (2 if source.expert is None else 3):
                raise UnsupportedError(f"{path}: tensor {source.name!r} of shape {list(shape)} is {kind}")
            is_member = layout.stack_member(name) is not None or layout.is_transposed(name)
            is_norm = source.offset != 0 or name.endswith("norm.weight")
            if is_norm or source.is_kernel or (not name.endswith(".weight") and not is_member):
                raise UnsupportedError(
                    f"{path}: tensor {source.name!r} is {kind}; expected one of {', '.join(FLOAT_TYPES)}, since it is "
                    "no matrix of weights"
                )
            types[name] = kind
            if source.change is not None and source.change.columns is not None:
                columns[name] = source.change.columns.tolist()
    files = {part.path.name: GgufTensors(file, part, sources, heads) for part in file.parts}
    if types:
        config["quantization_config"] = {"quant_method": "gguf", "types": types, "columns": columns}
    return config, files


def all_layers(config: Mapping[str, Any]) -> int:
    """The layers of a model with those that guess tokens."""
    layers: int = config["num_hidden_layers"] + config.get("num_nextn_predict_layers", 0)
    return layers


def _check_places(path: Path, names: Mapping[str, str], config: Mapping[str, Any], architecture: Architecture) -> None:
    """Refuse tensors that the architecture would leave unread.

    Raises:
        UnsupportedError: there is one.
    """
    layers = all_layers(config)
    layer = re.compile(re.escape(architecture.layers) + r"(?P<index>\d+)\.")
    for name, theirs in names.items():
        match = layer.match(name)
        if match is not None and int(match["index"]) >= layers:
            raise UnsupportedError(f"{path}: tensor {theirs!r:.80} is beyond the {layers} layers of the model")
        if "_norm.weight" in name and ".self_attn." in name and not architecture.has_qk_norms:
            raise UnsupportedError(
                f"{path}: tensor {theirs!r:.80} is not part of the architecture {architecture.model_type}"
            )


def _check_experts(path: Path, file: GgufFile, sources: Mapping[str, Source], config: Mapping[str, Any]) -> None:
    """Refuse stacks with more or fewer experts than the model.

    Raises:
        FormatError: there is one.
    """
    count = config.get("num_experts", 0)
    for source in sources.values():
        for name in source.tensors if source.expert == 0 else ():
            found = file.tensors[name].shape[0]
            if found != count:
                raise FormatError(
                    f"{path}: tensor {name!r:.80} has {found} experts, and the model {count} (expert_count)"
                )


def _biases(
    path: Path, names: Mapping[str, str], config: Mapping[str, Any], architecture: Architecture
) -> dict[str, bool]:
    """Which projections have a bias, as config.json says it.

    Raises:
        UnsupportedError: only some have one, or others than the architecture allows.
    """
    layers = all_layers(config)
    left = {name for name in names if name.endswith(".bias") and not name.endswith(architecture.loose_biases)}
    if architecture.has_norm_biases:
        norms = {f"{name.removesuffix('.weight')}.bias" for name in names if names[name].endswith("_norm.weight")}
        left -= norms
    if architecture.has_head_bias:
        left = {name for name in left if names[name] != "output.bias"}
    found = {}
    for key, parts in architecture.biases.items():
        found[key] = False
        if layers * len(parts) <= len(left):  # the number of layers is what the file claims
            complete = {f"{architecture.layers}{index}.{part}.bias" for index in range(layers) for part in parts}
            found[key] = complete <= left
            left -= complete if found[key] else set()
    if left:
        raise UnsupportedError(
            f"{path}: tensor {names[min(left)]!r:.80} is a bias that {architecture.model_type} does not have, or that "
            "other projections and layers lack; this is not implemented"
        )
    found.pop("", None)
    return found
