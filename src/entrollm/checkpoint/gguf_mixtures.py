"""The architectures of GGUF files with experts."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from entrollm.checkpoint.gguf_architecture import (
    ATTENTION,
    GRANITE_FACTORS,
    QKV,
    Architecture,
    Values,
    layer_kinds,
    rotated_granite,
)


def counted_experts(values: Values, config: dict[str, Any]) -> dict[str, Any]:
    """The experts of a model, and those of a token."""
    count, used = values.integer("expert_count"), values.integer("expert_used_count")
    return {"num_experts": count, "num_local_experts": count, "num_experts_per_tok": used}


def _qwen3_moe(values: Values, config: dict[str, Any]) -> dict[str, Any]:
    size = values.integer("expert_feed_forward_length")
    return {**counted_experts(values, config), "moe_intermediate_size": size, "norm_topk_prob": True}


def _qwen2_moe(values: Values, config: dict[str, Any]) -> dict[str, Any]:
    # Some converters leave out the size of the part that all tokens run through, which is then the common one.
    shared = values.integer("expert_shared_feed_forward_length", config["intermediate_size"])
    return {
        **counted_experts(values, config),
        "moe_intermediate_size": values.integer("expert_feed_forward_length"),
        "shared_expert_intermediate_size": shared,
        "norm_topk_prob": False,
    }


def _olmoe(values: Values, config: dict[str, Any]) -> dict[str, Any]:
    return {**counted_experts(values, config), "norm_topk_prob": False}


def _gpt_oss(values: Values, config: dict[str, Any]) -> dict[str, Any]:
    rope = config["rope_parameters"]
    return {
        **counted_experts(values, config),
        "intermediate_size": values.integer("expert_feed_forward_length"),
        # The model's own code does not round the limits of the stretched frequencies.
        "rope_parameters": rope | ({"truncate": False} if rope["rope_type"] == "yarn" else {}),
        **layer_kinds(values, config, 2),
    }


def _glm4_moe(values: Values, config: dict[str, Any]) -> dict[str, Any]:
    has_norms = values.has_tensor("blk.0.attn_q_norm.weight")
    return {**_corrected(values, config), "use_qk_norm": has_norms, "num_nextn_predict_layers": _guessing(values)}


def _guessing(values: Values) -> int:
    return values.integer("nextn_predict_layers", 0, low=0)


def _corrected(values: Values, config: dict[str, Any]) -> dict[str, Any]:
    """Experts chosen by sigmoids plus a correction, within groups."""
    values.expect("expert_gating_func", _SIGMOID, "sigmoids")
    counts = counted_experts(values, config)
    return {
        **counts,
        "n_routed_experts": counts["num_experts"],
        "n_shared_experts": values.integer("expert_shared_count", 0, low=0),
        "moe_intermediate_size": values.integer("expert_feed_forward_length"),
        "first_k_dense_replace": values.integer("leading_dense_block_count", 0, low=0),
        "routed_scaling_factor": values.number("expert_weights_scale", 0.0) or 1.0,
        "norm_topk_prob": values.flag("expert_weights_norm", False),
        "n_group": values.integer("expert_group_count", 1, low=0) or 1,
        "topk_group": values.integer("expert_group_used_count", 1, low=0) or 1,
    }


def _granite_moe(values: Values, config: dict[str, Any]) -> dict[str, Any]:
    shared = values.integer("expert_shared_feed_forward_length", 0, low=0)
    variant = {
        "architectures": ["GraniteMoeSharedForCausalLM"],
        "model_type": "granitemoeshared",
        "shared_intermediate_size": shared,
    }
    return {**counted_experts(values, config), **rotated_granite(values, config), **(variant if shared else {})}


def _ernie4_5_moe(values: Values, config: dict[str, Any]) -> dict[str, Any]:
    counts = counted_experts(values, config)
    return {
        **counts,
        "moe_num_experts": counts["num_experts"],
        "moe_k": counts["num_experts_per_tok"],
        "moe_intermediate_size": values.integer("expert_feed_forward_length"),
        "moe_num_shared_experts": values.integer("expert_shared_count", 0, low=0),
        "moe_layer_start_index": values.integer("leading_dense_block_count", 0, low=0),
        "moe_layer_interval": values.integer("interleave_moe_layer_step", 1),
    }


# How llama.cpp numbers what makes scores of the products of a router.
_SIGMOID = 2
_EXPERT_KEYS = frozenset({"expert_count", "expert_used_count", "expert_feed_forward_length"})
_ROUTED = {
    "ffn_gate_inp": "mlp.gate",
    "ffn_gate_exps": "mlp.experts.{}.gate_proj",
    "ffn_up_exps": "mlp.experts.{}.up_proj",
    "ffn_down_exps": "mlp.experts.{}.down_proj",
}
_SHARED = {
    "ffn_gate_inp_shexp": "mlp.shared_expert_gate",
    "ffn_gate_shexp": "mlp.shared_expert.gate_proj",
    "ffn_up_shexp": "mlp.shared_expert.up_proj",
    "ffn_down_shexp": "mlp.shared_expert.down_proj",
}
_SHARED_EXPERTS = {
    "ffn_gate_shexp": "mlp.shared_experts.gate_proj",
    "ffn_up_shexp": "mlp.shared_experts.up_proj",
    "ffn_down_shexp": "mlp.shared_experts.down_proj",
}
_CORRECTED_KEYS = _EXPERT_KEYS | {
    *("expert_shared_count", "leading_dense_block_count", "expert_gating_func", "expert_weights_scale"),
    *("expert_weights_norm", "expert_group_count", "expert_group_used_count"),
}
# The layer that guesses tokens.
_NEXT = {
    "nextn.eh_proj": "eh_proj",
    "nextn.enorm": "enorm",
    "nextn.hnorm": "hnorm",
    "nextn.embed_tokens": "embed_tokens",
    "nextn.shared_head_head": "shared_head.head",
    "nextn.shared_head_norm": "shared_head.norm",
}
# What "llama" is with experts.
MIXTRAL = Architecture(
    model_type="mixtral",
    class_name="MixtralForCausalLM",
    extend=counted_experts,
    keys=frozenset({"expert_count", "expert_used_count"}),
    parts={
        "ffn_gate_inp": "block_sparse_moe.gate",
        "ffn_gate_exps": "block_sparse_moe.experts.{}.w1",
        "ffn_up_exps": "block_sparse_moe.experts.{}.w3",
        "ffn_down_exps": "block_sparse_moe.experts.{}.w2",
    },
    interleaves=True,
)

MIXTURES: Mapping[str, Architecture] = MappingProxyType(
    {
        "glm4moe": Architecture(
            model_type="glm4_moe",
            class_name="Glm4MoeForCausalLM",
            extend=_glm4_moe,
            keys=_CORRECTED_KEYS | {"nextn_predict_layers"},
            parts=_ROUTED | _SHARED_EXPERTS | _NEXT | {"post_attention_norm": "post_attention_layernorm"},
            whole_names={"exp_probs_b.bias": "mlp.gate.e_score_correction_bias"},
            rotates_part=True,
            has_qk_norms=True,
            biases={"attention_bias": QKV},
        ),
        "granitemoe": Architecture(
            model_type="granitemoe",
            class_name="GraniteMoeForCausalLM",
            extend=_granite_moe,
            keys=GRANITE_FACTORS | {"expert_count", "expert_used_count", "expert_shared_feed_forward_length"},
            parts={
                "ffn_gate_inp": "block_sparse_moe.router.layer",
                "ffn_gate_shexp": "shared_mlp.input_linear",
                "ffn_up_shexp": "shared_mlp.input_linear",
                "ffn_down_shexp": "shared_mlp.output_linear",
            },
            whole_names={
                "ffn_gate_exps.weight": "block_sparse_moe.input_linear.weight.{}",
                "ffn_up_exps.weight": "block_sparse_moe.input_linear.weight.{}",
                "ffn_down_exps.weight": "block_sparse_moe.output_linear.weight.{}",
            },
            following={
                "ffn_up_exps.weight": "ffn_gate_exps.weight",
                "ffn_up_shexp.weight": "ffn_gate_shexp.weight",
            },
            interleaves=True,
            biases={"attention_bias": ATTENTION},
        ),
        "ernie4_5-moe": Architecture(
            model_type="ernie4_5_moe",
            class_name="Ernie4_5_MoeForCausalLM",
            extend=_ernie4_5_moe,
            keys=_EXPERT_KEYS
            | {*("expert_shared_count", "leading_dense_block_count", "interleave_moe_layer_step")}
            | {"expert_shared_feed_forward_length"},
            parts=_ROUTED | _SHARED_EXPERTS,
            whole_names={"exp_probs_b.bias": "mlp.moe_statics.e_score_correction_bias"},
            rows=("e_score_correction_bias",),
        ),
        "qwen2moe": Architecture(
            model_type="qwen2_moe",
            class_name="Qwen2MoeForCausalLM",
            extend=_qwen2_moe,
            keys=_EXPERT_KEYS | {"expert_shared_feed_forward_length"},
            parts=_ROUTED | _SHARED,
            rows=("mlp.shared_expert_gate.weight",),
            biases={"qkv_bias": QKV},
        ),
        "qwen3moe": Architecture(
            model_type="qwen3_moe",
            class_name="Qwen3MoeForCausalLM",
            extend=_qwen3_moe,
            keys=_EXPERT_KEYS,
            parts=_ROUTED,
            has_qk_norms=True,
            biases={"attention_bias": ATTENTION},
        ),
        "olmoe": Architecture(
            model_type="olmoe",
            class_name="OlmoeForCausalLM",
            extend=_olmoe,
            keys=frozenset({"expert_count", "expert_used_count"}),
            parts=_ROUTED,
            has_qk_norms=True,
        ),
        "gpt-oss": Architecture(
            model_type="gpt_oss",
            class_name="GptOssForCausalLM",
            extend=_gpt_oss,
            keys=_EXPERT_KEYS,
            parts={"post_attention_norm": "post_attention_layernorm", "ffn_gate_inp": "mlp.router"},
            whole_names={
                "attn_sinks.weight": "self_attn.sinks",
                "ffn_gate_exps.weight": "mlp.experts.gate_up_proj.{}.T",
                "ffn_up_exps.weight": "mlp.experts.gate_up_proj.{}.T",
                "ffn_down_exps.weight": "mlp.experts.down_proj.{}.T",
                "ffn_gate_exps.bias": "mlp.experts.gate_up_proj_bias",
                "ffn_up_exps.bias": "mlp.experts.gate_up_proj_bias",
                "ffn_down_exps.bias": "mlp.experts.down_proj_bias",
            },
            alternating={
                "ffn_up_exps.weight": "ffn_gate_exps.weight",
                "ffn_up_exps.bias": "ffn_gate_exps.bias",
            },
            has_windows=True,
            biases={"attention_bias": ATTENTION, "": ("mlp.router",)},
        ),
    }
)
