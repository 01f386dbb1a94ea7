"""The architectures of GGUF files: what llama.cpp calls their tensors, and what they add to config.json."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Protocol


class Values(Protocol):
    """The keys of a file's architecture, without its name."""

    def integer(self, name: str, default: int | None = None, *, low: int = 1) -> int:
        """An integer."""

    def number(self, name: str, default: float | None = None) -> float:
        """A finite number."""

    def has(self, name: str) -> bool:
        """Whether the key is there."""


Extend = Callable[[Values, dict[str, Any]], dict[str, Any]]


def _nothing(values: Values, config: dict[str, Any]) -> dict[str, Any]:
    return {}


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """What one of llama.cpp's architectures is in Hugging Face's terms.

    Attributes:
        model_type, class_name: of config.json.
        extend: what the architecture adds to config.json, from the keys and from what all have.
        keys: keys that `extend` reads.
        parts: the names of a layer's tensors that are not the usual ones, without their end. In those of stacks, {}
            is the number of the expert.
        whole_names: the same, for names that differ in their end.
        alternating: the end of a tensor's name, whose rows come after those of the tensor with the second end.
        rows: the ends of names that are matrices of one row, and vectors in the file.
        rotates_part: only a part of each head may be rotated.
        norm_offset: how much more the weights of norms are in the file.
        interleaves: rows of queries and keys that are rotated together are neighbours in the file.
        has_qk_norms: queries and keys are normalised.
        has_windows: layers may see a part of the context alone.
        biases: projections that may have biases, by the key of config.json that says so; "" if the model type does.
    """

    model_type: str
    class_name: str
    extend: Extend = _nothing
    keys: frozenset[str] = frozenset()
    parts: Mapping[str, str] = field(default_factory=dict)
    whole_names: Mapping[str, str] = field(default_factory=dict)
    alternating: Mapping[str, str] = field(default_factory=dict)
    rows: tuple[str, ...] = ()
    rotates_part: bool = False
    norm_offset: float = 0.0
    interleaves: bool = False
    has_qk_norms: bool = False
    has_windows: bool = False
    biases: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


_QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
_ATTENTION = (*_QKV, "self_attn.o_proj")
_MLP = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
_FULL, _SLIDING = "full_attention", "sliding_attention"
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


def _kinds(values: Values, config: dict[str, Any], pattern: int) -> dict[str, Any]:
    """Windows in all layers but every `pattern`-th, if the file has a window."""
    layers = config["num_hidden_layers"]
    window = values.integer("attention.sliding_window", 0, low=0)
    pattern = values.integer("attention.sliding_window_pattern", pattern)
    kinds = [_SLIDING if window and (index + 1) % pattern else _FULL for index in range(layers)]
    return {"layer_types": kinds, "sliding_window": window or None}


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
        **_kinds(values, config, 2),
    }


def _gemma3(values: Values, config: dict[str, Any]) -> dict[str, Any]:
    local = {"rope_type": "default", "rope_theta": values.number("rope.freq_base_swa", 10000.0)}
    cap = values.number("final_logit_softcapping", 0.0)
    return {
        "hidden_activation": "gelu_pytorch_tanh",
        "rope_parameters": {_FULL: config["rope_parameters"], _SLIDING: local},
        "final_logit_softcapping": cap or None,
        **_query_scale(config, _GEMMA3_27B),
        **_kinds(values, config, 6),
    }


def _granite(values: Values, config: dict[str, Any]) -> dict[str, Any]:
    # 0 is no factor, as in llama.cpp.
    return {
        "attention_multiplier": values.number("attention.scale", 0.0) or config["head_dim"] ** -0.5,
        "embedding_multiplier": values.number("embedding_scale", 0.0) or 1.0,
        "residual_multiplier": values.number("residual_scale", 0.0) or 1.0,
        "logits_scaling": values.number("logit_scale", 0.0) or 1.0,
    }


def _smollm3(values: Values, config: dict[str, Any]) -> dict[str, Any]:
    return {"no_rope_layers": [int((index + 1) % 4 != 0) for index in range(config["num_hidden_layers"])]}


def _experts(values: Values, config: dict[str, Any]) -> dict[str, Any]:
    count, used = values.integer("expert_count"), values.integer("expert_used_count")
    return {"num_experts": count, "num_local_experts": count, "num_experts_per_tok": used}


def _qwen3_moe(values: Values, config: dict[str, Any]) -> dict[str, Any]:
    size = values.integer("expert_feed_forward_length")
    return {**_experts(values, config), "moe_intermediate_size": size, "norm_topk_prob": True}


def _qwen2_moe(values: Values, config: dict[str, Any]) -> dict[str, Any]:
    # Some converters leave out the size of the part that all tokens run through, which is then the common one.
    shared = values.integer("expert_shared_feed_forward_length", config["intermediate_size"])
    return {
        **_experts(values, config),
        "moe_intermediate_size": values.integer("expert_feed_forward_length"),
        "shared_expert_intermediate_size": shared,
        "norm_topk_prob": False,
    }


def _olmoe(values: Values, config: dict[str, Any]) -> dict[str, Any]:
    return {**_experts(values, config), "norm_topk_prob": False}


def _gpt_oss(values: Values, config: dict[str, Any]) -> dict[str, Any]:
    rope = config["rope_parameters"]
    return {
        **_experts(values, config),
        "intermediate_size": values.integer("expert_feed_forward_length"),
        # The model's own code does not round the limits of the stretched frequencies.
        "rope_parameters": rope | ({"truncate": False} if rope["rope_type"] == "yarn" else {}),
        **_kinds(values, config, 2),
    }


def _phi3(values: Values, config: dict[str, Any]) -> dict[str, Any]:
    return {"sliding_window": values.integer("attention.sliding_window", 0, low=0) or None}


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
# What "llama" is with experts.
MIXTRAL = Architecture(
    model_type="mixtral",
    class_name="MixtralForCausalLM",
    extend=_experts,
    keys=frozenset({"expert_count", "expert_used_count"}),
    parts={
        "ffn_gate_inp": "block_sparse_moe.gate",
        "ffn_gate_exps": "block_sparse_moe.experts.{}.w1",
        "ffn_up_exps": "block_sparse_moe.experts.{}.w3",
        "ffn_down_exps": "block_sparse_moe.experts.{}.w2",
    },
    interleaves=True,
)

ARCHITECTURES: Mapping[str, Architecture] = MappingProxyType(
    {
        # Mistral models are "llama" in these files.
        "llama": Architecture(
            model_type="llama",
            class_name="LlamaForCausalLM",
            interleaves=True,
            biases={"attention_bias": _ATTENTION, "mlp_bias": _MLP},
        ),
        "qwen2": Architecture(model_type="qwen2", class_name="Qwen2ForCausalLM", biases={"": _QKV}),
        "qwen3": Architecture(
            model_type="qwen3",
            class_name="Qwen3ForCausalLM",
            has_qk_norms=True,
            biases={"attention_bias": _ATTENTION},
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
        "granite": Architecture(
            model_type="granite",
            class_name="GraniteForCausalLM",
            extend=_granite,
            keys=frozenset({"attention.scale", "embedding_scale", "residual_scale", "logit_scale"}),
            interleaves=True,
            biases={"attention_bias": _ATTENTION, "mlp_bias": _MLP},
        ),
        "smollm3": Architecture(
            model_type="smollm3",
            class_name="SmolLM3ForCausalLM",
            extend=_smollm3,
            interleaves=True,
            biases={"attention_bias": _ATTENTION, "mlp_bias": _MLP},
        ),
        "olmo2": Architecture(
            model_type="olmo2",
            class_name="Olmo2ForCausalLM",
            parts=_OUTPUT_NORMS,
            has_qk_norms=True,
        ),
        "qwen2moe": Architecture(
            model_type="qwen2_moe",
            class_name="Qwen2MoeForCausalLM",
            extend=_qwen2_moe,
            keys=_EXPERT_KEYS | {"expert_shared_feed_forward_length"},
            parts=_ROUTED | _SHARED,
            rows=("mlp.shared_expert_gate.weight",),
            biases={"qkv_bias": _QKV},
        ),
        "qwen3moe": Architecture(
            model_type="qwen3_moe",
            class_name="Qwen3MoeForCausalLM",
            extend=_qwen3_moe,
            keys=_EXPERT_KEYS,
            parts=_ROUTED,
            has_qk_norms=True,
            biases={"attention_bias": _ATTENTION},
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
            biases={"attention_bias": _ATTENTION, "": ("mlp.router",)},
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
            biases={"attention_bias": _QKV},
        ),
        "seed_oss": Architecture(
            model_type="seed_oss",
            class_name="SeedOssForCausalLM",
            parts={"post_attention_norm": "post_attention_layernorm"},
            biases={"attention_bias": _QKV},
        ),
    }
)
