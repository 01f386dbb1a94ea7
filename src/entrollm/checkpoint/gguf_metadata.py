"""The metadata of a GGUF file as config.json: every key of an architecture is used, checked, or refused by name."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from entrollm.checkpoint.gguf_architecture import Architecture
from entrollm.checkpoint.gguf_architectures import ARCHITECTURES
from entrollm.checkpoint.gguf_mixtures import MIXTRAL
from entrollm.checkpoint.gguf_vocabulary import Vocabulary, end_tokens, start_token
from entrollm.errors import FormatError, UnsupportedError
from entrollm.files.gguf import GgufFile

_FACTORS, _LONG, _SHORT = "rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight"
# The architectures that may have factors for long and for short texts.
_TWO_LENGTHS = ("phi3", "phimoe")
# Tensors that say how queries and keys are rotated.
ROTATIONS = frozenset({_FACTORS, _LONG, _SHORT})

# Keys of an architecture, without its name, that `_config` and `_rope` read.
_USED = frozenset(
    {"vocab_size", "context_length", "embedding_length", "block_count", "feed_forward_length", "attention.head_count"}
    | {"attention.head_count_kv", "attention.key_length", "attention.value_length", "attention.scale"}
    | {"attention.layer_norm_rms_epsilon", "attention.sliding_window", "rope.dimension_count", "rope.freq_base"}
    | {"rope.scale_linear", "rope.scaling.type", "rope.scaling.factor", "rope.scaling.attn_factor"}
    | {"rope.scaling.original_context_length", "rope.scaling.yarn_beta_fast", "rope.scaling.yarn_beta_slow"}
)
# Keys that say nothing about what the model computes.
_INERT = frozenset({"rope.scaling.finetuned", "decoder_start_token_id", "pooling_type", "attention.layer_norm_epsilon"})
# Keys of variants that these architectures do not have, and the values at which they do nothing.
_FIXED: Mapping[str, tuple[object, ...]] = MappingProxyType(
    {
        "attention.causal": (True,),
        "attention.max_alibi_bias": (0,),
        "attention.clamp_kqv": (0,),
        "attention.output_scale": (0, 1),
        "attention.value_scale": (0, 1),
        "attention.temperature_length": (0,),
        "attention.temperature_scale": (0,),
        "attention.shared_kv_layers": (0,),
        "use_parallel_residual": (False,),
        "tensor_data_layout": ("Meta AI original pth",),
        "hidden_activation": ("silu", "swish"),
        "expert_count": (0,),
        "expert_used_count": (0,),
        "leading_dense_block_count": (0,),
        "nextn_predict_layers": (0,),
        "logit_scale": (0, 1),
        "residual_scale": (0, 1),
        "embedding_scale": (0, 1),
        "attn_logit_softcapping": (0,),
        "final_logit_softcapping": (0,),
        "rope.scaling.alpha": (0,),
        "rope.scaling.yarn_ext_factor": (1, -1),
        "rope.scaling.yarn_attn_factor": (1,),
        # Converters of different models write different multiples of it, and llama.cpp does not read it for these.
        "rope.scaling.yarn_log_multiplier": (0,),
    }
)
_GENERAL: Mapping[str, tuple[object, ...]] = MappingProxyType(
    {
        "general.type": ("model",),
        "general.quantization_version": (2,),
        "general.sampling.penalty_repeat": (1,),
        "general.sampling.mirostat": (0,),
        "general.sampling.xtc_probability": (0,),
    }
)
# How to sample, by the names of generation_config.json.
_SAMPLING = {"temp": "temperature", "top_k": "top_k", "top_p": "top_p", "min_p": "min_p"}
# How Llama 3 stretches its rotation; the files hold only the factors that follow.
_LLAMA3_FACTORS = (8.0, 16.0, 32.0)
_LLAMA3 = {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}
_LLAMA3_CONTEXT = 8192
# Names of tensors have four digits for the layer.
_MAX_LAYERS = 10_000
_LARGEST = float(np.finfo(np.float32).max)
# Divisors of frequencies that leave features as they are, in Gemma 4.
_HARDLY = 1e20


def model_config(file: GgufFile) -> tuple[Architecture, dict[str, Any]]:
    """The architecture of a file, and the config.json that a model of its values and tensors has.

    Raises:
        FormatError: a value is missing or malformed.
        UnsupportedError: the architecture, or an option of it, is not implemented; the message names the key.
    """
    metadata = _Metadata(file)
    embedding = file.tensors.get("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2:
        raise FormatError(f"{file.path}: there is no matrix token_embd.weight")
    metadata.check_keys()
    hidden, heads = metadata.integer("embedding_length"), metadata.integer("attention.head_count")
    head_dim = metadata.integer("attention.key_length", hidden // heads)
    context_length = metadata.integer("context_length")
    if not metadata.architecture.has_own_heads:
        metadata.expect("attention.value_length", head_dim, "the keys' length")
    metadata.expect("vocab_size", embedding.shape[0], "the rows of token_embd.weight")
    architecture = metadata.architecture
    rope = _rope(metadata, file, context_length)
    if architecture.rotates_part:
        rope["partial_rotary_factor"] = metadata.integer("rope.dimension_count", head_dim) / head_dim
    elif not architecture.has_own_heads:
        metadata.expect("rope.dimension_count", head_dim, "the heads' length, of which all is rotated")
    window = metadata.integer("attention.sliding_window", 0, low=0)
    if 0 < window < context_length and not architecture.has_windows:
        raise metadata.unsupported("attention.sliding_window")
    scale = metadata.number("attention.scale", 0.0)
    if scale and "attention.scale" not in architecture.keys and not math.isclose(scale, head_dim**-0.5, rel_tol=1e-4):
        raise metadata.unsupported("attention.scale")
    vocabulary = Vocabulary.read(file)
    if vocabulary.tokens and len(vocabulary.tokens) != embedding.shape[0]:
        raise FormatError(
            f"{file.path}: tokenizer.ggml.tokens has {len(vocabulary.tokens)} tokens, and token_embd.weight "
            f"{embedding.shape[0]} rows"
        )
    ends = end_tokens(vocabulary)
    config = {
        "architectures": [architecture.class_name],
        "model_type": architecture.model_type,
        "vocab_size": embedding.shape[0],
        "hidden_size": hidden,
        "intermediate_size": metadata.inner_size(),
        "num_hidden_layers": metadata.layers(),
        "num_attention_heads": heads,
        "num_key_value_heads": metadata.size("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": metadata.number(architecture.eps),
        "max_position_embeddings": context_length,
        "rope_parameters": rope,
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "dtype": "float32",
        "bos_token_id": start_token(vocabulary),
        "eos_token_id": ends[0] if len(ends) == 1 else ends or None,
    }
    return architecture, config | architecture.extend(metadata, config)


def generation_config(file: GgufFile) -> dict[str, Any]:
    """The generation_config.json that the file's advice on sampling amounts to; empty if it has none."""
    prefix = "general.sampling."
    found = {ours: file.metadata[prefix + key] for key, ours in _SAMPLING.items() if prefix + key in file.metadata}
    if not found:
        return {}
    does_sample = found.get("temperature") != 0
    if not does_sample:
        del found["temperature"]
    if does_sample:
        found = {"top_k": 0} | found
    numbers = {key: float(str(np.float32(n))) if isinstance(n, float) else n for key, n in found.items()}
    return {"do_sample": does_sample, **numbers}


class _Metadata:
    """Typed access to the values of a file, with errors that name the key."""

    def __init__(self, file: GgufFile) -> None:
        self._path = file.path
        self._values, self._tensors = file.metadata, file.tensors
        architecture = self._values.get("general.architecture")
        if not isinstance(architecture, str) or architecture not in ARCHITECTURES:
            raise UnsupportedError(
                f"{file.path}: architecture {architecture!r:.80} is not supported; supported are "
                f"{', '.join(ARCHITECTURES)}"
            )
        self._prefix = f"{architecture}."
        has_experts = architecture == "llama" and self._values.get("llama.expert_count", 0) != 0
        self.architecture = MIXTRAL if has_experts else ARCHITECTURES[architecture]

    def check_keys(self) -> None:
        """Check the keys that must have one value, and refuse those of the architecture that are not known."""
        for key, value in self._values.items():
            name = key.removeprefix(self._prefix)
            if name != key and name in self.architecture.keys:
                continue
            allowed = _GENERAL.get(key) if name == key else _FIXED.get(name)
            if allowed is not None:
                # True is 1 to Python, and a flag is not a number.
                if not any(value == one and isinstance(value, bool) == isinstance(one, bool) for one in allowed):
                    raise UnsupportedError(
                        f"{self._path}: {key} {value!r:.80} is not implemented; it should be {allowed[0]!r}"
                    )
            elif name != key and name not in _USED | _INERT:
                raise UnsupportedError(
                    f"{self._path}: the key {key!r:.80} is not known; it may change what the model computes, so the "
                    "file is not read"
                )

    def unsupported(self, name: str) -> UnsupportedError:
        """The error to raise for the value of a key."""
        key = self._prefix + name
        return UnsupportedError(f"{self._path}: {key} {self._values.get(key)!r:.80} is not implemented")

    def expect(self, name: str, expected: int, what: str) -> None:
        """Check an integer that may be there and must then have one value."""
        if self.integer(name, expected) != expected:
            key = self._prefix + name
            raise UnsupportedError(f"{self._path}: {key} is {self._values[key]!r:.80}, expected {expected}, {what}")

    def integer(self, name: str, default: int | None = None, *, low: int = 1) -> int:
        """An integer in [low, 2^31); of a list with one value for each layer, all must be equal."""
        key = self._prefix + name
        value = self._values.get(key, default)
        if isinstance(value, list) and value:
            if any(item != value[0] for item in value):
                raise UnsupportedError(f"{self._path}: {key} differs between layers, which is not implemented")
            value = value[0]
        if type(value) is not int or not low <= value < 2**31:
            raise FormatError(f"{self._path}: {key} is {value!r:.80}, expected a positive integer")
        return value

    def integers(self, name: str, count: int) -> list[int]:
        """A list of `count` integers in [0, 2^31); one integer stands for as many of it."""
        key = self._prefix + name
        value = self._values.get(key)
        if type(value) is int:
            return [self.integer(name)] * count
        if isinstance(value, list) and len(value) == count and all(type(n) is int and 0 <= n < 2**31 for n in value):
            return value
        raise FormatError(f"{self._path}: {key} is {value!r:.80}, expected {count} integers from 0")

    def layers(self) -> int:
        """The layers of the model, without those that guess tokens."""
        name = "nextn_predict_layers"
        guessing = self.integer(name, 0, low=0) if name in self.architecture.keys else 0
        layers = self.integer("block_count")
        if layers > _MAX_LAYERS:
            raise FormatError(f"{self._path}: {self._prefix}block_count is {layers}, expected at most {_MAX_LAYERS}")
        if guessing >= layers:
            raise FormatError(f"{self._path}: {self._prefix}{name} is {guessing}, of {layers} layers in all")
        return layers - guessing

    def flags(self, name: str, count: int) -> list[bool]:
        """A list of `count` booleans."""
        key = self._prefix + name
        value = self._values.get(key)
        if isinstance(value, list) and len(value) == count and all(isinstance(flag, bool) for flag in value):
            return value
        raise FormatError(f"{self._path}: {key} is {value!r:.80}, expected {count} times true or false")

    def size(self, name: str, default: int | None = None) -> int:
        """An integer; the first of a list that is not 0 where layers may differ."""
        if not self.architecture.has_layer_sizes or not isinstance(self._values.get(self._prefix + name), list):
            return self.integer(name, default)
        found = [size for size in self.integers(name, self.layers()) if size]
        if not found:
            raise FormatError(f"{self._path}: {self._prefix}{name} is 0 for all layers")
        return found[0]

    def inner_size(self) -> int:
        """The features of a feed-forward part; those of an expert if there are none besides."""
        name = "expert_feed_forward_length"
        is_given = self.has("feed_forward_length") or name not in self.architecture.keys or not self.has(name)
        return self.size("feed_forward_length") if is_given else self.integer(name)

    def number(self, name: str, default: float | None = None) -> float:
        """A finite number of 32 bits."""
        key = self._prefix + name
        value = self._values.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= _LARGEST:
            raise FormatError(f"{self._path}: {key} is {value!r:.80}, expected a number of 32 bits")
        return float(str(np.float32(value)))  # the decimal that was meant: the file has it in 32 bits

    def flag(self, name: str, default: bool) -> bool:
        """A boolean."""
        key = self._prefix + name
        value = self._values.get(key, default)
        if not isinstance(value, bool):
            raise FormatError(f"{self._path}: {key} is {value!r:.80}, expected true or false")
        return value

    def text(self, name: str, default: str) -> str:
        """A string."""
        key = self._prefix + name
        value = self._values.get(key, default)
        if not isinstance(value, str):
            raise FormatError(f"{self._path}: {key} is {value!r:.80}, expected a string")
        return value

    def has(self, name: str) -> bool:
        """Whether the key is there."""
        return self._prefix + name in self._values

    def has_tensor(self, name: str) -> bool:
        """Whether the file has a tensor."""
        return name in self._tensors


def _rope(metadata: _Metadata, file: GgufFile, context_length: int) -> dict[str, Any]:
    theta = metadata.number("rope.freq_base", 10000.0)
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": theta}
    kind = metadata.text("rope.scaling.type", "linear") or "none"
    # 0 is no factor, as in llama.cpp.
    factor = metadata.number("rope.scaling.factor", metadata.number("rope.scale_linear", 1.0)) or 1.0
    attention = metadata.number("rope.scaling.attn_factor", 1.0)
    if _LONG in file.tensors or _SHORT in file.tensors:
        return rope | _longrope(metadata, file)
    if kind not in _SCALINGS:
        raise UnsupportedError(f"{file.path}: rope scaling {kind!r:.80} is not supported; supported are linear, yarn")
    if attention != 1.0 and kind != "yarn":
        raise metadata.unsupported("rope.scaling.attn_factor")
    if _FACTORS in file.tensors:
        if not metadata.architecture.has_factors or (factor != 1.0 and kind != "none"):
            raise UnsupportedError(f"{file.path}: {_FACTORS} and a scaling of rotations are not supported together")
        factors = file.array(_FACTORS).astype(np.float64).reshape(-1)
        head_dim = metadata.integer("embedding_length") // metadata.integer("attention.head_count")
        pairs = metadata.integer("rope.dimension_count", metadata.integer("attention.key_length", head_dim)) // 2
        if len(factors) != pairs:
            raise FormatError(
                f"{file.path}: {_FACTORS} holds {len(factors)} factors, expected {pairs}, one for every two "
                "rotated features of a head; fetch it again"
            )
        if metadata.architecture.model_type == "gemma4_text":
            return rope | _proportional(file.path, factors)
        return {**_llama3(file.path, theta, factors), "rope_theta": theta}
    return rope | _SCALINGS[kind](metadata, factor, context_length)


def _proportional(path: Path, factors: NDArray[np.float64]) -> dict[str, Any]:
    """The parameters of Gemma 4, where the last features are rotated by next to nothing."""
    rotated = int((factors == 1).sum())
    if not (factors[:rotated] == 1).all() or not (factors[rotated:] >= _HARDLY).all():
        raise UnsupportedError(f"{path}: {_FACTORS} holds factors that are not those of Gemma 4")
    return {"rope_type": "proportional", "partial_rotary_factor": rotated / len(factors)}


def _longrope(metadata: _Metadata, file: GgufFile) -> dict[str, Any]:
    if metadata.architecture.model_type not in _TWO_LENGTHS or not {_LONG, _SHORT} <= file.tensors.keys():
        raise UnsupportedError(
            f"{file.path}: {_LONG} and {_SHORT} are supported together, for the architectures {', '.join(_TWO_LENGTHS)}"
        )
    factors = {name: file.array(name).astype(np.float64).reshape(-1).tolist() for name in (_LONG, _SHORT)}
    for name, numbers in factors.items():
        if not all(0 < number < math.inf for number in numbers):
            raise FormatError(f"{file.path}: {name} holds a factor that is not positive and finite; fetch it again")
    return {
        "rope_type": "longrope",
        "long_factor": factors[_LONG],
        "short_factor": factors[_SHORT],
        "attention_factor": metadata.number("rope.scaling.attn_factor", 1.0),
        "original_max_position_embeddings": metadata.integer("rope.scaling.original_context_length"),
    }


def _unscaled(metadata: _Metadata, factor: float, context_length: int) -> dict[str, Any]:
    return {}


def _linear(metadata: _Metadata, factor: float, context_length: int) -> dict[str, Any]:
    return {} if factor == 1.0 else {"rope_type": "linear", "factor": factor}


def _yarn(metadata: _Metadata, factor: float, context_length: int) -> dict[str, Any]:
    original = metadata.integer("rope.scaling.original_context_length", context_length)
    rope: dict[str, Any] = {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": original}
    for name in ("beta_fast", "beta_slow"):
        if metadata.has(f"rope.scaling.yarn_{name}"):
            rope[name] = metadata.number(f"rope.scaling.yarn_{name}")
    attention = metadata.number("rope.scaling.attn_factor", 1.0)
    if attention != 1.0:
        rope["attention_factor"] = attention * (1.0 + (0.1 * math.log(factor) if factor > 1 else 0.0))
    return rope


_SCALINGS: Mapping[str, Callable[[_Metadata, float, int], dict[str, Any]]] = MappingProxyType(
    {"none": _unscaled, "linear": _linear, "yarn": _yarn}
)


def _llama3(path: Path, theta: float, factors: NDArray[np.float64]) -> dict[str, Any]:
    """The parameters of Llama 3 that give these divisors of the frequencies."""
    frequencies = theta ** -(np.arange(len(factors)) / len(factors))
    wavelengths = 2 * np.pi / frequencies
    smooth = np.clip((_LLAMA3_CONTEXT / wavelengths - 1) / (4 - 1), 0, 1)
    for factor in _LLAMA3_FACTORS:
        expected = 1 / ((1 - smooth) / factor + smooth)
        if np.allclose(factors, expected, rtol=1e-3):
            return {**_LLAMA3, "factor": factor, "original_max_position_embeddings": _LLAMA3_CONTEXT}
    raise UnsupportedError(f"{path}: {_FACTORS} holds factors that are not those of Llama 3")
