"""What an absent or null key of config.json means, field by field, against the config classes of transformers."""

from __future__ import annotations

import copy
import importlib
import inspect
from typing import Any

import numpy as np
import pytest
import transformers

from entrollm.errors import EntroLLMError
from entrollm.models import ARCHITECTURES, read_config
from entrollm.models.config import LatentAttention, ModelConfig
from entrollm.models.config_fields import Fields

_SIZES = {
    "vocab_size": 320,
    "hidden_size": 2048,
    "intermediate_size": 128,
    "num_hidden_layers": 30,
    "num_attention_heads": 32,
}
_CONFIGS = {
    "cohere2": "Cohere2Config",
    "deepseek_v2": "DeepseekV2Config",
    "deepseek_v3": "DeepseekV3Config",
    "ernie4_5": "Ernie4_5Config",
    "ernie4_5_moe": "Ernie4_5_MoeConfig",
    "exaone4": "Exaone4Config",
    "gemma": "GemmaConfig",
    "gemma2": "Gemma2Config",
    "gemma3_text": "Gemma3TextConfig",
    "gemma4_text": "Gemma4TextConfig",
    "gemma4_unified_text": "Gemma4UnifiedTextConfig",
    "glm4": "Glm4Config",
    "glm4_moe": "Glm4MoeConfig",
    "glm4_moe_lite": "Glm4MoeLiteConfig",
    "gpt2": "GPT2Config",
    "gpt_neox": "GPTNeoXConfig",
    "gpt_oss": "GptOssConfig",
    "granite": "GraniteConfig",
    "granitemoe": "GraniteMoeConfig",
    "granitemoehybrid": "GraniteMoeHybridConfig",
    "granitemoeshared": "GraniteMoeSharedConfig",
    "lfm2": "Lfm2Config",
    "llama": "LlamaConfig",
    "ministral": "MinistralConfig",
    "ministral3": "Ministral3Config",
    "mistral": "MistralConfig",
    "mistral4": "Mistral4Config",
    "mixtral": "MixtralConfig",
    "nemotron": "NemotronConfig",
    "nemotron_h": "NemotronHConfig",
    "olmo2": "Olmo2Config",
    "olmo3": "Olmo3Config",
    "olmoe": "OlmoeConfig",
    "phi": "PhiConfig",
    "phi3": "Phi3Config",
    "phimoe": "PhimoeConfig",
    "qwen2": "Qwen2Config",
    "qwen2_moe": "Qwen2MoeConfig",
    "qwen3": "Qwen3Config",
    "qwen3_5_moe_text": "Qwen3_5MoeTextConfig",
    "qwen3_5_text": "Qwen3_5TextConfig",
    "qwen3_moe": "Qwen3MoeConfig",
    "qwen3_next": "Qwen3NextConfig",
    "seed_oss": "SeedOssConfig",
    "smollm3": "SmolLM3Config",
    "stablelm": "StableLmConfig",
}
_LATENT = ("deepseek_v2", "deepseek_v3", "glm4_moe_lite", "mistral4")
_WITHOUT_ROTATION = ("gpt2", "nemotron_h")
# GPT-2's own names of sizes.
_GPT2_SIZES = {"n_embd": 2048, "n_layer": 30, "n_head": 32}
_ACTIVATIONS = {"gelu_pytorch_tanh": "gelu_tanh", "gelu_new": "gelu_tanh"}
# The fields of each class that hold what is called rms_norm_eps and hidden_act in most.
_EPS = ("rms_norm_eps", "layer_norm_eps", "norm_eps", "layer_norm_epsilon")
_ACT = ("mlp_hidden_act", "hidden_act", "hidden_activation", "activation_function")


def _rotary(model_type: str) -> Any:
    """The class of the rotary embedding of an architecture."""
    kind = _CONFIGS[model_type]
    folder = getattr(transformers, kind).__module__.rsplit(".", 2)[1]
    module = importlib.import_module(f"transformers.models.{folder}.modeling_{folder}")
    name = next(name for name in vars(module) if name.endswith("RotaryEmbedding") and "Vision" not in name)
    return getattr(module, name)


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
    {"rope_scaling": {"rope_type": "linear", "factor": 2.0}},
    {"max_position_embeddings": 256, "rope_scaling": _LLAMA3},
    {"max_position_embeddings": 256, "rope_scaling": {**_LLAMA3, "original_max_position_embeddings": 64}},
    {"max_position_embeddings": 256, "rope_scaling": _LLAMA3, "original_max_position_embeddings": 64},
    {"max_position_embeddings": 256, "rope_scaling": {**_YARN, "original_max_position_embeddings": 64}},
    {"max_position_embeddings": 256, "rope_scaling": _YARN},
    {"max_position_embeddings": 9000, "head_dim": 64, "rope_scaling": {**_LONGROPE, "factor": 2.0}},
    {"max_position_embeddings": 9000, "rope_scaling": _LONGROPE, "original_max_position_embeddings": 64},
    {"max_position_embeddings": 9000, "rope_scaling": {**_LONGROPE, "original_max_position_embeddings": 64}},
]


def _sizes(model_type: str) -> dict[str, Any]:
    if model_type == "gpt2":
        return {"vocab_size": 320, **_GPT2_SIZES}
    if model_type == "granitemoehybrid":
        return {**_SIZES, "layer_types": ["full_attention"] * 30, "num_local_experts": 0}
    if model_type == "deepseek_v2":
        return {**_SIZES, "num_experts_per_tok": 6}
    if model_type == "glm4_moe_lite":
        return {**_SIZES, "num_key_value_heads": 32}
    if model_type == "nemotron_h":
        return {**_SIZES, "layers_block_type": ["linear_attention", "full_attention", "moe"] * 10}
    return _SIZES


def _read(model_type: str, changes: dict[str, Any]) -> ModelConfig | None:
    try:
        return read_config(Fields({"model_type": model_type, **_sizes(model_type), **changes}, "config.json"))
    except EntroLLMError:
        return None


def _theirs(model_type: str, changes: dict[str, Any]) -> Any:
    """The config of transformers, or None where it refuses the values."""
    if model_type in ("stablelm", "gpt_neox", "gpt2") and "head_dim" in changes:
        return None  # which its rotary embedding follows, and the rest of its model does not
    if model_type in _LATENT and "head_dim" in changes:
        return None  # which its rotary embedding follows, and not the features that are rotated
    if model_type == "mistral4" and ("rope_scaling" in changes or "rope_parameters" in changes):
        return None  # its rotary embedding then has the size of a whole head, and its model fails
    if model_type in ("gemma3_text", "olmo3") and "type" in (changes.get("rope_scaling") or {}):
        return None  # an older name of rope_type that their rotation by kind of layer silently ignores
    try:
        config = getattr(transformers, _CONFIGS[model_type]).from_dict({**_sizes(model_type), **copy.deepcopy(changes)})
        if model_type.startswith("gemma4"):
            config.allow_global_per_layer_attribute_access = True
        if model_type not in _WITHOUT_ROTATION:
            _rotary(model_type)(config)
    except Exception:  # of many kinds, from the checks of several libraries
        return None
    needed = (*_COUNTS, *_LATENT_SIZES) if not model_type.startswith("gemma4") else ()
    if any(getattr(config, name, 1) is None for name in needed):
        return None  # its model fails
    return config


def _first(config: Any, names: tuple[str, ...]) -> Any:
    return next(getattr(config, name) for name in names if hasattr(config, name))


_COUNTS = ("num_local_experts", "num_experts", "moe_num_experts", "num_experts_per_tok", "moe_k", "n_routed_experts")
_LATENT_SIZES = (
    *("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "moe_intermediate_size"),
    "first_k_dense_replace",
)
_UNIFORM = ("mistral", "ministral3", "mixtral", "phi3", "phimoe", "qwen3_moe")
_BIAS = ("use_qkv_bias", "qkv_bias", "attention_bias")
_BIASED = ("qwen2", "phi", "gpt2")


def _windows(model_type: str, theirs: Any) -> list[int | None]:
    window = getattr(theirs, "sliding_window", None)
    if model_type == "smollm3" and not theirs.use_sliding_window:
        window = None
    # The configurations of these keep a sliding_window or layer_types that are in the file; their models do not.
    kinds = getattr(theirs, "layer_types", None) if model_type not in (*_UNIFORM, "llama") else None
    if kinds:
        return [window if kind == "sliding_attention" else None for kind in kinds]
    return [window if model_type in _UNIFORM else None] * 30


def _assert_equal(model_type: str, ours: ModelConfig, theirs: Any) -> None:
    head_dim = getattr(theirs, "head_dim", None) or theirs.hidden_size // theirs.num_attention_heads
    eos = theirs.eos_token_id if isinstance(theirs.eos_token_id, list) else [theirs.eos_token_id]
    activation = next((getattr(theirs, name) for name in _ACT if hasattr(theirs, name)), "silu")
    if model_type in _LATENT:
        _assert_equal_latent(ours, theirs)
    else:
        assert ours.head_dim == head_dim
        kv_heads = None if model_type in ("gpt_neox", "gpt2") else theirs.num_key_value_heads
        assert ours.num_kv_heads == (kv_heads or theirs.num_attention_heads)
    assert ours.norm_eps == _first(theirs, _EPS)
    assert ours.tied_embeddings == theirs.tie_word_embeddings
    assert ours.bos_token_id == theirs.bos_token_id
    assert list(ours.eos_token_ids) == [token for token in eos if token is not None]
    assert ours.activation == _ACTIVATIONS.get(activation, activation)
    assert list(ours.windows) == _windows(model_type, theirs)
    bias = bool(next((getattr(theirs, name) for name in _BIAS if hasattr(theirs, name)), False))
    assert ours.qkv_bias == (model_type in _BIASED or (bias and model_type not in _LATENT))
    assert ours.mlp_bias == (model_type in ("phi", "gpt2", "gpt_neox") or bool(getattr(theirs, "mlp_bias", False)))
    for experts in filter(None, ours.experts):
        assert (experts.count, experts.used) == (
            _first(theirs, ("n_routed_experts", "num_local_experts", "num_experts")),
            theirs.num_experts_per_tok,
        )
        if hasattr(theirs, "routed_scaling_factor"):
            assert experts.routing.scale == theirs.routed_scaling_factor
        assert experts.normalises == bool(getattr(theirs, "norm_topk_prob", True))
        assert experts.expert.size == getattr(theirs, "moe_intermediate_size", theirs.intermediate_size)
    for ours_name, name in _SAME:
        # A factor of null is an error there.
        if hasattr(theirs, name) and (getattr(theirs, name) is not None or ours_name.endswith("cap")):
            assert getattr(ours, ours_name) == getattr(theirs, name)
    if hasattr(theirs, "query_pre_attn_scalar"):
        assert ours.attention_scale == theirs.query_pre_attn_scalar**-0.5
    if model_type not in _WITHOUT_ROTATION:
        _assert_equal_ropes(ours, theirs, _rotary(model_type)(theirs))


def _assert_equal_latent(ours: ModelConfig, theirs: Any) -> None:
    for index in range(30):
        form = ours.mixer(index)
        assert isinstance(form, LatentAttention)
        assert (form.rank, form.query_rank) == (theirs.kv_lora_rank, theirs.q_lora_rank)
        assert (form.plain, form.rotated, form.value) == (
            theirs.qk_nope_head_dim,
            theirs.qk_rope_head_dim,
            theirs.v_head_dim,
        )
        assert form.has_bias == theirs.attention_bias
    kinds = getattr(theirs, "mlp_layer_types", None)
    if kinds is None:
        kinds = ["dense" if index < theirs.first_k_dense_replace else "sparse" for index in range(30)]
    assert [each is not None for each in ours.experts] == [kind == "sparse" for kind in kinds]
    shared = next(each for each in ours.experts if each is not None).shared
    assert (shared.size if shared else 0) == theirs.n_shared_experts * theirs.moe_intermediate_size


_SAME = [
    ("attention_cap", "attn_logit_softcapping"),
    ("logit_cap", "final_logit_softcapping"),
    ("attention_scale", "attention_multiplier"),
    ("embedding_scale", "embedding_multiplier"),
    ("residual_scale", "residual_multiplier"),
    ("logit_scale", "logit_scale"),
    ("logit_scale", "logits_scaling"),
]


def _assert_equal_ropes(ours: ModelConfig, theirs: Any, rotary: Any) -> None:
    parameters = theirs.rope_parameters
    if hasattr(rotary, "inv_freq"):
        np.testing.assert_allclose(ours.rope.frequencies, rotary.inv_freq.numpy(), rtol=1e-5)
        assert ours.rope.scale == pytest.approx(rotary.attention_scaling)
    else:
        for kind, rope in zip(theirs.layer_types, ours.ropes, strict=True):
            assert rope is not None
            np.testing.assert_allclose(rope.frequencies, getattr(rotary, f"{kind}_inv_freq").numpy(), rtol=1e-5)
            assert rope.scale == pytest.approx(getattr(rotary, f"{kind}_attention_scaling"))
        parameters = parameters["full_attention"]
    if hasattr(theirs, "no_rope_layers"):
        assert [rope is not None for rope in ours.ropes] == [bool(rotates) for rotates in theirs.no_rope_layers]
    if parameters["rope_type"] == "longrope":
        assert ours.rope.switch_length == parameters["original_max_position_embeddings"]
    if parameters["rope_type"] in ("default", "linear"):
        assert ours.context_length == theirs.max_position_embeddings


def test_every_architecture_is_compared() -> None:
    assert _CONFIGS.keys() == ARCHITECTURES.keys()


@pytest.mark.parametrize("model_type", sorted(_CONFIGS))
def test_defaults_are_those_of_transformers(model_type: str) -> None:
    compared = 0
    for changes in _CHANGES:
        ours, theirs = _read(model_type, changes), _theirs(model_type, changes)
        if ours is not None and theirs is not None:
            _assert_equal(model_type, ours, theirs)
            compared += 1
    assert compared >= len(_CHANGES) // 3


@pytest.mark.parametrize("model_type", sorted(_CONFIGS))
def test_null_means_what_it_means_there(model_type: str) -> None:
    parameters = inspect.signature(getattr(transformers, _CONFIGS[model_type]).__init__).parameters
    keys = [key for key in parameters if key not in _SIZES]
    compared = 0
    for key in [*keys, "rope_scaling", "rope_theta"]:
        ours, theirs = _read(model_type, {key: None}), _theirs(model_type, {key: None})
        if ours is not None and theirs is not None:
            _assert_equal(model_type, ours, theirs)
            compared += 1
    assert compared > 8
