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

from entrollm.errors import FormatError, UnsupportedError
from entrollm.files.gguf import FLOAT_TYPES, GgufFile, GgufTensor, open_gguf
from entrollm.files.safetensors import Entry

# By llama.cpp's name of the architecture, which is also the model type. Its Mistral models are "llama".
_ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}
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
_ROPE_FACTORS = "rope_freqs.weight"
# How Llama 3 stretches its rotation. The files hold only the factors that result.
_LLAMA3_FACTORS = (8.0, 32.0)
_LLAMA3 = {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}
_LLAMA3_CONTEXT = 8192
_NO_SCALING = ("none", "")


class GgufTensors:
    """The tensors of a GGUF file under Hugging Face's names; quantized ones are U8 (rows, bytes of a row).

    Attributes:
        path, size_bytes: the file.
        tensors: the tensors by name.
        names: the name in the file of each tensor.
    """

    def __init__(self, file: GgufFile, heads: Mapping[str, int]) -> None:
        self.path = file.path
        self.size_bytes = file.size_bytes
        self._file = file
        self.names: Mapping[str, str] = {
            _rename(file.path, name): name for name in file.tensors if name != _ROPE_FACTORS
        }
        self._heads = heads
        self.tensors: Mapping[str, Entry] = MappingProxyType(
            {name: _entry(file.tensors[theirs]) for name, theirs in self.names.items()}
        )

    def array(self, name: str) -> NDArray[Any]:
        """A tensor in Hugging Face's row order; a view, except for queries and keys of the llama architecture."""
        array = self._file.array(self.names[name])
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


def open_gguf_model(path: Path) -> tuple[dict[str, Any], GgufTensors]:
    """Open a GGUF file.

    Returns:
        a config.json, whose quantization_config names the block type of each quantized tensor, and the tensors.
    Raises:
        FormatError: the file is malformed or lacks a value.
        UnsupportedError: its architecture, or an option of the architecture, is not implemented.
    """
    file = open_gguf(path)
    if file.metadata.get("split.count", 1) not in (0, 1):
        raise UnsupportedError(f"{path} is one of several parts; join them with `llama-gguf-split --merge`")
    reader = _Metadata(file)
    config = _config(reader, file)
    heads = {}
    if reader.architecture == "llama":
        heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
    tensors = GgufTensors(file, heads)
    types = {}
    for name, theirs in tensors.names.items():
        tensor = file.tensors[theirs]
        if tensor.type.name not in FLOAT_TYPES:
            if len(tensor.shape) != 2:
                raise UnsupportedError(f"{path}: tensor {theirs!r} of shape {list(tensor.shape)} is {tensor.type.name}")
            types[name] = tensor.type.name
    if types:
        config["quantization_config"] = {"quant_method": "gguf", "types": types}
    return config, tensors


class _Metadata:
    """Typed access to the metadata of a file, with errors that name the key."""

    def __init__(self, file: GgufFile) -> None:
        self._path = file.path
        self._values = file.metadata
        architecture = self._values.get("general.architecture")
        if not isinstance(architecture, str) or architecture not in _ARCHITECTURES:
            raise UnsupportedError(
                f"{file.path}: architecture {architecture!r:.80} is not supported; supported are "
                f"{', '.join(_ARCHITECTURES)}"
            )
        self.architecture = architecture

    def integer(self, key: str, default: int | None = None) -> int:
        value = self._values.get(f"{self.architecture}.{key}", default)
        if type(value) is not int or not 0 < value < 2**31:
            raise FormatError(f"{self._path}: {self.architecture}.{key} is {value!r:.80}, expected a positive integer")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        value = self._values.get(f"{self.architecture}.{key}", default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise FormatError(f"{self._path}: {self.architecture}.{key} is {value!r:.80}, expected a number")
        return float(str(np.float32(value)))  # the file rounded a decimal number to 32 bits; this restores it

    def text(self, key: str) -> str:
        value = self._values.get(f"{self.architecture}.{key}", "")
        if not isinstance(value, str):
            raise FormatError(f"{self._path}: {self.architecture}.{key} is {value!r:.80}, expected a string")
        return value

    def token(self, name: str) -> int | None:
        value = self._values.get(f"tokenizer.ggml.{name}_token_id")
        return value if type(value) is int else None


def _config(reader: _Metadata, file: GgufFile) -> dict[str, Any]:
    """The config.json of the model that the file was made from."""
    embedding = file.tensors.get("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2:
        raise FormatError(f"{file.path}: there is no matrix token_embd.weight")
    hidden, heads = reader.integer("embedding_length"), reader.integer("attention.head_count")
    if reader.number("expert_count", 0):
        raise UnsupportedError(f"{file.path}: mixtures of experts are not implemented")
    config: dict[str, Any] = {
        "architectures": [_ARCHITECTURES[reader.architecture]],
        "model_type": reader.architecture,
        "vocab_size": embedding.shape[0],
        "hidden_size": hidden,
        "intermediate_size": reader.integer("feed_forward_length"),
        "num_hidden_layers": reader.integer("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": reader.integer("attention.head_count_kv", heads),
        "head_dim": reader.integer("attention.key_length", hidden // heads),
        "hidden_act": "silu",
        "rms_norm_eps": reader.number("attention.layer_norm_rms_epsilon"),
        "max_position_embeddings": reader.integer("context_length"),
        "rope_parameters": _rope(reader, file),
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "dtype": "float32",
    }
    if reader.architecture != "qwen2":
        config["attention_bias"] = "blk.0.attn_q.bias" in file.tensors
        config["mlp_bias"] = "blk.0.ffn_up.bias" in file.tensors
    for key in ("bos", "eos"):
        if (token := reader.token(key)) is not None:
            config[f"{key}_token_id"] = token
    return config


def _rope(reader: _Metadata, file: GgufFile) -> dict[str, Any]:
    theta = reader.number("rope.freq_base", 10000.0)
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": theta}
    scaling = reader.text("rope.scaling.type")
    if scaling not in _NO_SCALING:
        if scaling not in ("linear", "yarn"):
            raise UnsupportedError(
                f"{file.path}: rope scaling {scaling!r:.80} is not supported; supported are linear, yarn"
            )
        rope |= {"rope_type": scaling, "factor": reader.number("rope.scaling.factor")}
        if scaling == "yarn":
            rope["original_max_position_embeddings"] = reader.integer("rope.scaling.original_context_length")
    if _ROPE_FACTORS in file.tensors:
        factors = file.array(_ROPE_FACTORS).astype(np.float64).reshape(-1)
        return {**_llama3(file.path, theta, factors), "rope_theta": theta}
    return rope


def _llama3(path: Path, theta: float, factors: NDArray[np.float64]) -> dict[str, Any]:
    """The rope parameters of Llama 3 that divide the frequencies by `factors`."""
    frequencies = theta ** -(np.arange(len(factors)) / len(factors))
    wavelengths = 2 * np.pi / frequencies
    smooth = np.clip((_LLAMA3_CONTEXT / wavelengths - 1) / (4 - 1), 0, 1)
    for factor in _LLAMA3_FACTORS:
        expected = 1 / ((1 - smooth) / factor + smooth)
        if np.allclose(factors, expected, rtol=1e-3):
            return {**_LLAMA3, "factor": factor, "original_max_position_embeddings": _LLAMA3_CONTEXT}
    raise UnsupportedError(f"{path}: {_ROPE_FACTORS} holds factors that are not those of Llama 3")


def _rename(path: Path, name: str) -> str:
    match = _NAME.fullmatch(name)
    if match is not None:
        layer, part, kind = match["layer"], match["part"], match["kind"]
        if layer is None and part in _OUTER:
            return f"{_OUTER[part]}.{kind}"
        if layer is not None and part in _INNER:
            return f"model.layers.{int(layer)}.{_INNER[part]}.{kind}"
    raise UnsupportedError(f"{path}: tensor {name!r:.80} is not part of a supported architecture")


def _entry(tensor: GgufTensor) -> Entry:
    if tensor.type.name in FLOAT_TYPES:
        return Entry(tensor.type.name, tensor.shape, tensor.begin, tensor.end)
    rows = math.prod(tensor.shape[:-1])
    return Entry("U8", (rows, (tensor.end - tensor.begin) // rows), tensor.begin, tensor.end)
