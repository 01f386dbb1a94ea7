"""The architectures of GGUF files: what llama.cpp calls their tensors, and what they add to config.json."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from entrollm.checkpoint.gguf_architecture import (
    ATTENTION,
    FULL,
    GRANITE_FACTORS,
    MLP,
    QKV,
    SLIDING,
    Architecture,
    Values,
    layer_kinds,
    rotated_granite,
)
from entrollm.checkpoint.gguf_changes import Changes, Joined, Rows
from entrollm.checkpoint.gguf_hybrids import HYBRIDS
from entrollm.checkpoint.gguf_latent import LATENT
from entrollm.checkpoint.gguf_layer_norm import CENTERED
from entrollm.checkpoint.gguf_mixtures import MIXTURES

_FOUR_NORMS = {
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
_OUTPUT_NORMS = {
    "post_attention_norm": "post_attention_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
# The numbers of layers by which llama.cpp knows the models whose scores have another scale.
_GEMMA2_27B, _GEMMA3_27B = 46, 62


def _gemma(values: Values, config: dict[str, Any]) -> dict[str, Any]:
    return {"hidden_act": "gelu_pytorch_tanh"}


def _query_scale(config: dict[str, Any], large: int) -> dict[str, Any]:
    """The query_pre_attn_scalar, which is another one in the largest model of a family."""
    if config["num_hidden_layers"] == large:
        return {"query_pre_attn_scalar": config["hidden_size"] // config["num_attention_heads"]}
    return {"query_pre_attn_scalar": config["head_dim"]}


def _gemma2(values: Values, config: dict[str, Any]) -> dict[str, Any]:
    return {
        "hidden_activation": "gelu_pytorch_tanh",
        "attn_logit_softcapping": values.number("attn_logit_softcapping", 50.0),
        "final_logit_softcapping": values.number("final_logit_softcapping", 30.0),
        **_query_scale(config, _GEMMA2_27B),
        **layer_kinds(values, config, 2),
    }


def _gemma3(values: Values, config: dict[str, Any]) -> dict[str, Any]:
    local = {"rope_type": "default", "rope_theta": values.number("rope.freq_base_swa", 10000.0)}
    cap = values.number("final_logit_softcapping", 0.0)
    return {
        "hidden_activation": "gelu_pytorch_tanh",
        "rope_parameters": {FULL: config["rope_parameters"], SLIDING: local},
        "final_logit_softcapping": cap or None,
        **_query_scale(config, _GEMMA3_27B),
        **layer_kinds(values, config, 6),
    }


def _gemma4(values: Values, config: dict[str, Any]) -> dict[str, Any]:
    layers, wide, cap = config["num_hidden_layers"], config["head_dim"], values.number("final_logit_softcapping", 0.0)
    slides = values.flags("attention.sliding_window_pattern", layers)
    heads = values.integers("attention.head_count_kv", layers)
    sizes = values.integers("feed_forward_length", layers)
    narrow = values.integer("attention.key_length_swa", wide)
    values.expect("attention.value_length_swa", narrow, "the keys' length")
    values.expect("rope.dimension_count_swa", narrow, "the heads' length, of which all is rotated")
    shared = values.integer("attention.shared_kv_layers", 0, low=0)
    experts: dict[str, Any] = {}
    if count := values.integer("expert_count", 0, low=0):
        experts = {"enable_moe_block": True, "num_experts": count}
        experts["top_k_experts"] = values.integer("expert_used_count")
        experts["moe_intermediate_size"] = values.integer("expert_feed_forward_length")
    full = [index for index in range(layers) if not slides[index]]
    return {
        **experts,
        "hidden_activation": "gelu_pytorch_tanh",
        "head_dim": narrow,
        "intermediate_size": sizes[0],
        "layer_types": [SLIDING if slid else FULL for slid in slides],
        "sliding_window": values.integer("attention.sliding_window"),
        "per_layer_config": {
            str(index): {"head_dim": narrow if slides[index] else wide, "num_key_value_heads": heads[index]}
            for index in range(layers)
        },
        "num_kv_shared_layers": shared,
        "use_double_wide_mlp": shared > 0 and sizes[-1] == 2 * sizes[0],
        "attention_k_eq_v": any(not values.has_tensor(f"blk.{index}.attn_v.weight") for index in full),
        "hidden_size_per_layer_input": values.integer("embedding_length_per_layer_input", 0, low=0),
        "vocab_size_per_layer_input": config["vocab_size"],
        "rope_parameters": {
            FULL: config["rope_parameters"],
            SLIDING: {"rope_type": "default", "rope_theta": values.number("rope.freq_base_swa", 10000.0)},
        },
        "final_logit_softcapping": cap or None,
    }


_LAYER_INPUTS = {
    "inp_gate": "per_layer_input_gate",
    "proj": "per_layer_projection",
    "post_norm": "post_per_layer_input_norm",
}
# The experts of Gemma 4, which run beside the usual part.
_BESIDE = {
    "ffn_gate_inp": "router.proj",
    "pre_ffw_norm_2": "pre_feedforward_layernorm_2",
    "post_ffw_norm_1": "post_feedforward_layernorm_1",
    "post_ffw_norm_2": "post_feedforward_layernorm_2",
}
_BESIDE_STACKS: Changes = {
    "ffn_gate_up_exps.weight": {"experts.gate_up_proj.{}": Rows()},
    "ffn_gate_exps.weight": {"experts.gate_up_proj.{}": Joined(others=("ffn_up_exps.weight",))},
    "ffn_down_exps.weight": {"experts.down_proj.{}": Rows()},
}


def _smollm3(values: Values, config: dict[str, Any]) -> dict[str, Any]:
    return {"no_rope_layers": [int((index + 1) % 4 != 0) for index in range(config["num_hidden_layers"])]}


def _ministral3(values: Values, config: dict[str, Any]) -> dict[str, Any]:
    rope = config["rope_parameters"]
    growth = values.number("attention.temperature_scale", 0.0)
    multiplier = values.number("rope.scaling.yarn_log_multiplier", 0.0)
    if growth:
        length = values.integer("rope.scaling.original_context_length")
        rope = rope | {"llama_4_scaling_beta": growth, "original_max_position_embeddings": length}
    if multiplier:
        rope = rope | {"mscale": 1.0, "mscale_all_dim": multiplier}
    return {"rope_parameters": rope}


def _olmo2(values: Values, config: dict[str, Any]) -> dict[str, Any]:
    kinds = layer_kinds(values, config, 4)
    if kinds["sliding_window"] is None:
        return {}
    rope = config["rope_parameters"]
    return {
        "architectures": ["Olmo3ForCausalLM"],
        "model_type": "olmo3",
        # Layers with windows are not stretched.
        "rope_parameters": {FULL: rope, SLIDING: {"rope_type": "default", "rope_theta": rope["rope_theta"]}},
        **kinds,
    }


def _cohere2(values: Values, config: dict[str, Any]) -> dict[str, Any]:
    return {
        "layer_norm_eps": config["rms_norm_eps"],
        "logit_scale": values.number("logit_scale"),
        **layer_kinds(values, config, 4),
    }


def _lfm2(values: Values, config: dict[str, Any]) -> dict[str, Any]:
    heads = values.integers("attention.head_count_kv", config["num_hidden_layers"])
    return {
        "norm_eps": config["rms_norm_eps"],
        "conv_L_cache": values.integer("shortconv.l_cache"),
        "block_auto_adjust_ff_dim": False,
        "layer_types": [FULL if count else "conv" for count in heads],
    }


_LFM2 = {
    "attn_norm": "operator_norm",
    "ffn_norm": "ffn_norm",
    "attn_output": "self_attn.out_proj",
    "attn_q_norm": "self_attn.q_layernorm",
    "attn_k_norm": "self_attn.k_layernorm",
    "ffn_gate": "feed_forward.w1",
    "ffn_up": "feed_forward.w3",
    "ffn_down": "feed_forward.w2",
    "shortconv.conv": "conv.conv",
    "shortconv.in_proj": "conv.in_proj",
    "shortconv.out_proj": "conv.out_proj",
}


def _phi3(values: Values, config: dict[str, Any]) -> dict[str, Any]:
    rope = config["rope_parameters"]
    key = "original_max_position_embeddings"
    return {
        "sliding_window": values.integer("attention.sliding_window", 0, low=0) or None,
        # Where this model type has it.
        **({key: rope[key]} if "long_factor" in rope else {}),
    }


ARCHITECTURES: Mapping[str, Architecture] = MappingProxyType(
    {
        # Mistral models are "llama" in these files.
        "llama": Architecture(
            model_type="llama",
            class_name="LlamaForCausalLM",
            interleaves=True,
            has_factors=True,
            biases={"attention_bias": ATTENTION, "mlp_bias": MLP},
        ),
        "mistral3": Architecture(
            model_type="ministral3",
            class_name="Ministral3ForCausalLM",
            extend=_ministral3,
            keys=frozenset({"attention.temperature_scale", "rope.scaling.yarn_log_multiplier"}),
            interleaves=True,
        ),
        "qwen2": Architecture(model_type="qwen2", class_name="Qwen2ForCausalLM", biases={"": QKV}),
        "qwen3": Architecture(
            model_type="qwen3",
            class_name="Qwen3ForCausalLM",
            has_qk_norms=True,
            biases={"attention_bias": ATTENTION},
        ),
        "gemma": Architecture(
            model_type="gemma",
            class_name="GemmaForCausalLM",
            extend=_gemma,
            norm_offset=1.0,
        ),
        "gemma2": Architecture(
            model_type="gemma2",
            class_name="Gemma2ForCausalLM",
            extend=_gemma2,
            keys=frozenset({"attn_logit_softcapping", "final_logit_softcapping", "attention.sliding_window_pattern"}),
            parts=_FOUR_NORMS,
            norm_offset=1.0,
            has_windows=True,
        ),
        "gemma3": Architecture(
            model_type="gemma3_text",
            class_name="Gemma3ForCausalLM",
            extend=_gemma3,
            keys=frozenset({"final_logit_softcapping", "attention.sliding_window_pattern", "rope.freq_base_swa"}),
            parts=_FOUR_NORMS,
            norm_offset=1.0,
            has_qk_norms=True,
            has_windows=True,
        ),
        "gemma4": Architecture(
            model_type="gemma4_text",
            class_name="Gemma4ForCausalLM",
            extend=_gemma4,
            keys=frozenset(
                {"attention.sliding_window_pattern", "attention.key_length_swa", "attention.value_length_swa"}
                | {"attention.shared_kv_layers", "embedding_length_per_layer_input", "final_logit_softcapping"}
                | {"rope.freq_base_swa", "rope.dimension_count_swa"}
                | {"expert_count", "expert_used_count", "expert_feed_forward_length"}
            ),
            parts=_FOUR_NORMS | _LAYER_INPUTS | _BESIDE,
            whole_names={
                "layer_output_scale.weight": "layer_scalar",
                "ffn_gate_inp.scale": "router.scale",
                "ffn_down_exps.scale": "router.per_expert_scale",
            },
            changes=lambda config: _BESIDE_STACKS,
            outer={
                "per_layer_token_embd": "model.embed_tokens_per_layer",
                "per_layer_model_proj": "model.per_layer_model_projection",
                "per_layer_proj_norm": "model.per_layer_projection_norm",
            },
            has_qk_norms=True,
            has_windows=True,
            has_factors=True,
            has_layer_sizes=True,
        ),
        "granite": Architecture(
            model_type="granite",
            class_name="GraniteForCausalLM",
            extend=rotated_granite,
            keys=GRANITE_FACTORS,
            interleaves=True,
            biases={"attention_bias": ATTENTION, "mlp_bias": MLP},
        ),
        "smollm3": Architecture(
            model_type="smollm3",
            class_name="SmolLM3ForCausalLM",
            extend=_smollm3,
            interleaves=True,
            biases={"attention_bias": ATTENTION, "mlp_bias": MLP},
        ),
        "olmo2": Architecture(
            model_type="olmo2",
            class_name="Olmo2ForCausalLM",
            extend=_olmo2,
            keys=frozenset({"attention.sliding_window_pattern"}),
            parts=_OUTPUT_NORMS,
            has_qk_norms=True,
            has_windows=True,
        ),
        "exaone4": Architecture(
            model_type="exaone4",
            class_name="Exaone4ForCausalLM",
            extend=lambda values, config: layer_kinds(values, config, 4),
            keys=frozenset({"attention.sliding_window_pattern"}),
            parts=_OUTPUT_NORMS,
            has_qk_norms=True,
            has_windows=True,
            has_factors=True,
        ),
        "cohere2": Architecture(
            model_type="cohere2",
            class_name="Cohere2ForCausalLM",
            extend=_cohere2,
            keys=frozenset({"logit_scale", "attention.sliding_window_pattern"}),
            eps="attention.layer_norm_epsilon",
            has_windows=True,
            biases={"attention_bias": ATTENTION},
        ),
        "ernie4_5": Architecture(
            model_type="ernie4_5",
            class_name="Ernie4_5ForCausalLM",
            biases={"use_bias": (*ATTENTION, *MLP)},
        ),
        "lfm2": Architecture(
            model_type="lfm2",
            class_name="Lfm2ForCausalLM",
            extend=_lfm2,
            keys=frozenset({"shortconv.l_cache"}),
            parts=_LFM2,
            kernels=("conv.conv.weight",),
            outer={"token_embd_norm": "model.embedding_norm"},
            has_qk_norms=True,
            has_layer_sizes=True,
        ),
        "phi3": Architecture(
            model_type="phi3",
            class_name="Phi3ForCausalLM",
            extend=_phi3,
            parts={"attn_qkv": "self_attn.qkv_proj", "ffn_up": "mlp.gate_up_proj"},
            has_windows=True,
            rotates_part=True,
        ),
        "glm4": Architecture(
            model_type="glm4",
            class_name="Glm4ForCausalLM",
            parts={
                "ffn_up": "mlp.gate_up_proj",
                "post_attention_norm": "post_self_attn_layernorm",
                "post_ffw_norm": "post_mlp_layernorm",
            },
            rotates_part=True,
            biases={"attention_bias": QKV},
        ),
        "seed_oss": Architecture(
            model_type="seed_oss",
            class_name="SeedOssForCausalLM",
            parts={"post_attention_norm": "post_attention_layernorm"},
            biases={"attention_bias": QKV},
        ),
        **CENTERED,
        **MIXTURES,
        **LATENT,
        **HYBRIDS,
    }
)
