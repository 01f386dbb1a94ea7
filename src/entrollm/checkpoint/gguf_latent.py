"""The architectures of GGUF files with latent attention: DeepSeek V2 and V3, GLM-4.7-Flash, Mistral 4."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from entrollm.checkpoint.gguf_architecture import Architecture, Values
from entrollm.checkpoint.gguf_changes import SPLIT_EXPERTS, Changes, Joined, KeysAndValues, Rows
from entrollm.checkpoint.gguf_mixtures import MIXTURES

# How llama.cpp numbers what makes scores of the products of a router.
_UNSTATED, _SOFTMAX, _SIGMOID = 0, 1, 2
# The layers and tokens by which llama.cpp knows GLM-4.7-Flash where its file does not say how scores are made.
_GLM_LAYERS, _GLM_TOKENS = (47, 48), 154880
# Files have a tenth of the multiplier.
_TENTH = 10


def _latent(values: Values, config: dict[str, Any]) -> dict[str, Any]:
    rotated = values.integer("rope.dimension_count")
    rank = values.integer("attention.kv_lora_rank")
    is_split = values.has("attention.key_length_mla")
    if is_split:
        # What runs in the file's form is attention over the latent vectors, with one key-value head.
        values.expect("attention.head_count_kv", 1, "the latent vector that all heads share")
        values.expect("attention.key_length", rank + rotated, "the latent vector's features and the rotated ones")
        values.expect("attention.value_length", rank, "the latent vector's features")
    else:
        values.expect("attention.head_count_kv", config["num_attention_heads"], "the heads of queries")
    suffix = "_mla" if is_split else ""
    plain = values.integer(f"attention.key_length{suffix}") - rotated
    if plain < 1:
        raise values.unsupported(f"attention.key_length{suffix}")
    routed = _routed(values, config)
    guessing = values.integer("nextn_predict_layers", 0, low=0)
    if guessing and routed["model_type"] != "deepseek_v3":
        raise values.unsupported("nextn_predict_layers")
    return {
        **routed,
        "num_key_value_heads": config["num_attention_heads"],
        # In transformers, the rotated features are a head of DeepSeek's, and a part of one of Mistral's.
        "head_dim": plain + rotated if routed["model_type"] == "mistral4" else rotated,
        "kv_lora_rank": rank,
        "q_lora_rank": values.integer("attention.q_lora_rank") if values.has("attention.q_lora_rank") else None,
        "qk_rope_head_dim": rotated,
        "qk_nope_head_dim": plain,
        "v_head_dim": values.integer(f"attention.value_length{suffix}"),
        "rope_interleave": True,
        "attention_bias": False,
        "rope_parameters": _rope(values, config),
        "num_nextn_predict_layers": guessing,
    }


def _rope(values: Values, config: dict[str, Any]) -> dict[str, Any]:
    rope: dict[str, Any] = config["rope_parameters"]
    if values.number("rope.scaling.attn_factor", 1.0) != 1.0:
        raise values.unsupported("rope.scaling.attn_factor")
    multiplier = round(_TENTH * values.number("rope.scaling.yarn_log_multiplier", 0.0), 6)
    if rope["rope_type"] == "yarn" and multiplier:
        # llama.cpp takes the two to be equal, as they are in all models of these kinds.
        rope = rope | {"mscale": multiplier, "mscale_all_dim": multiplier}
    growth = values.number("attention.temperature_scale", 0.0)
    if growth:
        length = values.integer("rope.scaling.original_context_length")
        values.expect("attention.temperature_length", length, "the original context length")
        rope = rope | {"llama_4_scaling_beta": growth, "original_max_position_embeddings": length}
    return rope


def _routed(values: Values, config: dict[str, Any]) -> dict[str, Any]:
    """The model type, which depends on how experts are chosen, and the experts."""
    count, used = values.integer("expert_count"), values.integer("expert_used_count")
    groups = values.integer("expert_group_count", 1, low=0) or 1
    normalises = values.flag("expert_weights_norm", False)
    gating = values.integer("expert_gating_func", _UNSTATED, low=0)
    if gating == _UNSTATED:
        is_glm = config["num_hidden_layers"] in _GLM_LAYERS and config["vocab_size"] == _GLM_TOKENS
        gating = _SIGMOID if is_glm else _SOFTMAX
    if gating not in (_SOFTMAX, _SIGMOID):
        raise values.unsupported("expert_gating_func")
    kind = {"model_type": "deepseek_v3", "architectures": ["DeepseekV3ForCausalLM"]}
    if gating == _SOFTMAX and normalises:
        kind = {"model_type": "mistral4", "architectures": ["Mistral4ForCausalLM"]}
    elif gating == _SOFTMAX:
        method = "greedy" if groups == 1 else "group_limited_greedy"
        kind = {"model_type": "deepseek_v2", "architectures": ["DeepseekV2ForCausalLM"], "topk_method": method}
    if kind["model_type"] != "mistral4" and values.number("attention.temperature_scale", 0.0):
        raise values.unsupported("attention.temperature_scale")
    return {
        **kind,
        "num_experts": count,
        "n_routed_experts": count,
        "num_experts_per_tok": used,
        "n_shared_experts": values.integer("expert_shared_count", 0, low=0),
        "moe_intermediate_size": values.integer("expert_feed_forward_length"),
        "first_k_dense_replace": values.integer("leading_dense_block_count", 0, low=0),
        "routed_scaling_factor": values.number("expert_weights_scale", 0.0) or 1.0,
        "norm_topk_prob": normalises,
        "n_group": groups,
        "topk_group": values.integer("expert_group_used_count", 1, low=0) or 1,
    }


def _changes(config: Mapping[str, Any]) -> Changes:
    latent = {"attn_k_b.weight": {"self_attn.kv_b_proj.weight": KeysAndValues(heads=config["num_attention_heads"])}}
    if config["model_type"] == "mistral4":
        # Its checkpoints have experts in stacks.
        return latent | {
            "ffn_gate_exps.weight": {"mlp.experts.gate_up_proj.{}": Joined(others=("ffn_up_exps.weight",))},
            "ffn_gate_up_exps.weight": {"mlp.experts.gate_up_proj.{}": Rows()},
            "ffn_down_exps.weight": {"mlp.experts.down_proj.{}": Rows()},
        }
    return {**latent, **SPLIT_EXPERTS}


_GLM = MIXTURES["glm4moe"]
_DEEPSEEK = Architecture(
    model_type="deepseek_v3",
    class_name="DeepseekV3ForCausalLM",
    extend=_latent,
    keys=_GLM.keys
    | {*("attention.q_lora_rank", "attention.kv_lora_rank", "attention.key_length_mla", "attention.value_length_mla")}
    | {*("rope.scaling.yarn_log_multiplier", "attention.temperature_scale", "attention.temperature_length")},
    parts={
        **_GLM.parts,
        "attn_q_a": "self_attn.q_a_proj",
        "attn_q_b": "self_attn.q_b_proj",
        "attn_q_a_norm": "self_attn.q_a_layernorm",
        "attn_kv_a_mqa": "self_attn.kv_a_proj_with_mqa",
        "attn_kv_a_norm": "self_attn.kv_a_layernorm",
        "attn_kv_b": "self_attn.kv_b_proj",
    },
    whole_names=_GLM.whole_names,
    has_own_heads=True,
    changes=_changes,
)
LATENT: Mapping[str, Architecture] = MappingProxyType({"deepseek2": _DEEPSEEK, "mistral4": _DEEPSEEK})
