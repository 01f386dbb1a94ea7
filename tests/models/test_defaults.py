"""What an absent or null key of config.json means, field by field, against the config classes of transformers."""

from __future__ import annotations

import inspect
from typing import Any

import numpy as np
import pytest
import transformers
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
from transformers.models.mistral.modeling_mistral import MistralRotaryEmbedding
from transformers.models.phi3.modeling_phi3 import Phi3RotaryEmbedding
from transformers.models.qwen2.modeling_qwen2 import Qwen2RotaryEmbedding
from transformers.models.qwen3.modeling_qwen3 import Qwen3RotaryEmbedding

from entrollm.errors import EntroLLMError
from entrollm.models import ARCHITECTURES, read_config
from entrollm.models.config import ModelConfig
from entrollm.models.config_fields import Fields

_SIZES = {
    "vocab_size": 320,
    "hidden_size": 2048,
    "intermediate_size": 128,
    "num_hidden_layers": 30,
    "num_attention_heads": 32,
}
_CLASSES: dict[str, tuple[Any, Any]] = {
    "llama": (transformers.LlamaConfig, LlamaRotaryEmbedding),
    "mistral": (transformers.MistralConfig, MistralRotaryEmbedding),
    "phi3": (transformers.Phi3Config, Phi3RotaryEmbedding),
    "qwen2": (transformers.Qwen2Config, Qwen2RotaryEmbedding),
    "qwen3": (transformers.Qwen3Config, Qwen3RotaryEmbedding),
}
_LONGROPE = {"rope_type": "longrope", "short_factor": [1.0] * 32, "long_factor": [2.0] * 32}
_YARN = {"rope_type": "yarn", "factor": 4.0}
_LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
# What is changed in an otherwise bare config.json. Null is tried for every key that transformers knows as well.
_CHANGES: list[dict[str, Any]] = [
    {},
    {"use_sliding_window": True},
    {"use_sliding_window": True, "sliding_window": 77},
    {"use_sliding_window": True, "sliding_window": None},
    {"use_sliding_window": True, "max_window_layers": 3},
    {"sliding_window": 77},
    {"num_key_value_heads": 4},
    {"num_key_value_heads": None, "sliding_window": None},
    {"head_dim": 32},
    {"rope_theta": 500.0},
    {"rope_theta": 500.0, "rope_parameters": {"rope_type": "default"}},
    {"rope_scaling": {"type": "linear", "factor": 2.0}},
    {"max_position_embeddings": 256, "rope_scaling": _LLAMA3},
    {"max_position_embeddings": 256, "rope_scaling": {**_LLAMA3, "original_max_position_embeddings": 64}},
    {"max_position_embeddings": 256, "rope_scaling": _LLAMA3, "original_max_position_embeddings": 64},
    {"max_position_embeddings": 256, "rope_scaling": {**_YARN, "original_max_position_embeddings": 64}},
    {"max_position_embeddings": 256, "rope_scaling": _YARN},
    {"max_position_embeddings": 9000, "head_dim": 64, "rope_scaling": {**_LONGROPE, "factor": 2.0}},
    {"max_position_embeddings": 9000, "rope_scaling": _LONGROPE, "original_max_position_embeddings": 64},
    {"max_position_embeddings": 9000, "rope_scaling": {**_LONGROPE, "original_max_position_embeddings": 64}},
]


def _read(model_type: str, changes: dict[str, Any]) -> ModelConfig | None:
    try:
        return read_config(Fields({"model_type": model_type, **_SIZES, **changes}, "config.json"))
    except EntroLLMError:
        return None


def _theirs(model_type: str, changes: dict[str, Any]) -> Any:
    """The config of transformers, or None where it refuses the values."""
    kind, rotary = _CLASSES[model_type]
    try:
        config = kind.from_dict({**_SIZES, **changes})
        rotary(config)
    except Exception:  # of many kinds, from the checks of several libraries
        return None
    return config


def _assert_equal(model_type: str, ours: ModelConfig, theirs: Any) -> None:
    found = {
        "head_dim": ours.head_dim,
        "num_key_value_heads": ours.num_kv_heads,
        "rms_norm_eps": ours.norm_eps,
        "tie_word_embeddings": ours.tied_embeddings,
        "bos_token_id": ours.bos_token_id,
        "eos_token_id": ours.eos_token_ids[0] if ours.eos_token_ids else None,
        "hidden_act": "silu",
    }
    assert ours.eos_token_ids in ((), (theirs.eos_token_id,))
    heads = theirs.hidden_size // theirs.num_attention_heads
    expected = {key: getattr(theirs, key, None) for key in found}
    assert found == {**expected, "head_dim": expected["head_dim"] or heads}
    # Llama's configuration keeps a sliding_window that is in the file, and its model does not read it.
    window = None if model_type == "llama" else theirs.sliding_window
    kinds = getattr(theirs, "layer_types", None) if model_type.startswith("qwen") else None
    windows = [window if kind == "sliding_attention" else None for kind in kinds] if kinds else [window] * 30
    assert list(ours.windows) == windows
    assert ours.qkv_bias == (model_type == "qwen2" or bool(getattr(theirs, "attention_bias", False)))
    assert ours.mlp_bias == bool(getattr(theirs, "mlp_bias", False))
    rotary = _CLASSES[model_type][1](theirs)
    np.testing.assert_allclose(ours.rope.frequencies, rotary.inv_freq.numpy(), rtol=1e-5)
    assert ours.rope.scale == pytest.approx(rotary.attention_scaling)
    parameters = theirs.rope_parameters
    if parameters["rope_type"] == "longrope":
        assert ours.rope.switch_length == parameters["original_max_position_embeddings"]
    if parameters["rope_type"] in ("default", "linear"):
        assert ours.context_length == theirs.max_position_embeddings


def test_every_architecture_is_compared() -> None:
    assert _CLASSES.keys() == ARCHITECTURES.keys()


@pytest.mark.parametrize("model_type", sorted(_CLASSES))
def test_defaults_are_those_of_transformers(model_type: str) -> None:
    compared = 0
    for changes in _CHANGES:
        ours, theirs = _read(model_type, changes), _theirs(model_type, changes)
        if ours is not None and theirs is not None:
            _assert_equal(model_type, ours, theirs)
            compared += 1
    assert compared >= len(_CHANGES) // 2


@pytest.mark.parametrize("model_type", sorted(_CLASSES))
def test_null_means_what_it_means_there(model_type: str) -> None:
    keys = [key for key in inspect.signature(_CLASSES[model_type][0].__init__).parameters if key not in _SIZES]
    compared = 0
    for key in [*keys, "rope_scaling", "rope_theta"]:
        ours, theirs = _read(model_type, {key: None}), _theirs(model_type, {key: None})
        if ours is not None and theirs is not None:
            _assert_equal(model_type, ours, theirs)
            compared += 1
    assert compared > 8
