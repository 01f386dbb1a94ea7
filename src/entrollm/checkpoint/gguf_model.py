"""Present a GGUF file as a checkpoint, with Hugging Face's tensor names, row order and config.json."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from entrollm.checkpoint.gguf_architectures import Architecture
from entrollm.checkpoint.gguf_metadata import ROPE_FACTORS, model_config
from entrollm.errors import FormatError, Message, UnsupportedError
from entrollm.files.gguf import FLOAT_TYPES, GgufFile, GgufTensor
from entrollm.files.gguf_parts import open_gguf_parts
from entrollm.files.safetensors import Entry

_OUTER = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_INNER = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_NAME = re.compile(r"(?:blk\.(?P<layer>\d{1,4})\.)?(?P<part>\w+)\.(?P<kind>weight|bias)")
_LAYER = re.compile(r"model\.layers\.(?P<index>\d+)\.")


class GgufTensors:
    """The tensors of a GGUF file under Hugging Face's names; quantized ones are U8 (rows, bytes of a row).

    Attributes:
        path, size_bytes: the file.
        tensors: the tensors by name.
        names: the name in the file of each tensor.
    """

    def __init__(self, file: GgufFile, architecture: Architecture, heads: Mapping[str, int]) -> None:
        self.path = file.path
        self.size_bytes = file.size_bytes
        self._file = file
        self.names: Mapping[str, str] = {
            _rename(file.path, name, architecture): name for name in file.tensors if name != ROPE_FACTORS
        }
        self._heads = heads
        self._norm_offset = np.float32(architecture.norm_offset)
        self.tensors: Mapping[str, Entry] = MappingProxyType(
            {name: _entry(file.tensors[theirs]) for name, theirs in self.names.items()}
        )

    def array(self, name: str) -> NDArray[Any]:
        """A tensor as Hugging Face has it; a view, except for norms and for queries and keys of some architectures."""
        array = self._file.array(self.names[name])
        if self._norm_offset and name.endswith("norm.weight"):
            return array.astype(np.float32) - self._norm_offset
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
        self._file.release(self.names[name])

    def close(self) -> None:
        """Close the file."""
        self._file.close()


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
    files = {part.path.name: GgufTensors(part, architecture, heads) for part in file.parts}
    names = {name: theirs for tensors in files.values() for name, theirs in tensors.names.items()}
    _check_places(path, names, config, architecture)
    config |= _biases(path, names, config, architecture)
    types = {}
    for name, theirs in names.items():
        tensor = file.tensors[theirs]
        if tensor.type.name not in FLOAT_TYPES:
            if len(tensor.shape) != 2:
                raise UnsupportedError(f"{path}: tensor {theirs!r} of shape {list(tensor.shape)} is {tensor.type.name}")
            types[name] = tensor.type.name
    if types:
        config["quantization_config"] = {"quant_method": "gguf", "types": types}
    return config, files


def _check_places(path: Path, names: Mapping[str, str], config: Mapping[str, Any], architecture: Architecture) -> None:
    """Refuse tensors that the architecture would leave unread.

    Raises:
        UnsupportedError: there is one.
    """
    layers = config["num_hidden_layers"]
    for name, theirs in names.items():
        match = _LAYER.match(name)
        if match is not None and int(match["index"]) >= layers:
            raise UnsupportedError(f"{path}: tensor {theirs!r:.80} is beyond the {layers} layers of the model")
        if "_norm.weight" in name and ".self_attn." in name and not architecture.has_qk_norms:
            raise UnsupportedError(
                f"{path}: tensor {theirs!r:.80} is not part of the architecture {architecture.model_type}"
            )


def _biases(
    path: Path, names: Mapping[str, str], config: Mapping[str, Any], architecture: Architecture
) -> dict[str, bool]:
    """Which projections have a bias, as config.json says it.

    Raises:
        UnsupportedError: only some have one, or others than the architecture allows.
    """
    layers = config["num_hidden_layers"]
    left = {name for name in names if name.endswith(".bias")}
    found = {}
    for key, parts in architecture.biases.items():
        found[key] = False
        if layers * len(parts) <= len(left):  # the number of layers is what the file claims
            complete = {f"model.layers.{index}.{part}.bias" for index in range(layers) for part in parts}
            found[key] = complete <= left
            left -= complete if found[key] else set()
    if left:
        raise UnsupportedError(
            f"{path}: tensor {names[min(left)]!r:.80} is a bias that {architecture.model_type} does not have, or that "
            "other projections and layers lack; this is not implemented"
        )
    found.pop("", None)
    return found


def _rename(path: Path, name: str, architecture: Architecture) -> str:
    match = _NAME.fullmatch(name)
    if match is not None:
        layer, part, kind = match["layer"], match["part"], match["kind"]
        if layer is None and part in _OUTER:
            return f"{_OUTER[part]}.{kind}"
        ours = architecture.parts.get(part) or _INNER.get(part)
        if layer is not None and ours is not None:
            return f"model.layers.{int(layer)}.{ours}.{kind}"
    raise UnsupportedError(f"{path}: tensor {name!r:.80} is not part of a supported architecture")


def _entry(tensor: GgufTensor) -> Entry:
    if tensor.type.name in FLOAT_TYPES:
        return Entry(tensor.type.name, tensor.shape, tensor.begin, tensor.end)
    rows = math.prod(tensor.shape[:-1])
    return Entry("U8", (rows, (tensor.end - tensor.begin) // rows), tensor.begin, tensor.end)
