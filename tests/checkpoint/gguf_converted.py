"""Small random models of transformers as GGUF files, written as llama.cpp's converter writes them.

The numbers of all matrices are multiples of 1/128 in [-1, 1], so that blocks of Q8_0 hold them exactly.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import transformers
from numpy.typing import NDArray

from tests.checkpoint.test_gguf_tokenizer import merges_of, trained, values_of
from tests.support.gguf_sources import GgufSource

Arrays = dict[str, NDArray[np.float32]]
_GRID = 128
_COMMON: dict[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": None,
}
_LATENT = {
    "num_key_value_heads": 4,
    "kv_lora_rank": 64,
    "q_lora_rank": 96,
    "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 32,
    "v_head_dim": 32,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "moe_intermediate_size": 64,
    "n_shared_experts": 2,
    "routed_scaling_factor": 1.5,
    "first_k_dense_replace": 1,
}
_YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 16}
_DELTA = {
    "head_dim": 32,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 6,
    "linear_key_head_dim": 32,
    "linear_value_head_dim": 32,
    "layer_types": ["linear_attention", "full_attention"],
    "partial_rotary_factor": 0.25,
}
_EXPERTS = {
    "num_experts": 6,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 64,
    "shared_expert_intermediate_size": 96,
}
_GRANITE = {
    "embedding_multiplier": 6.0,
    "attention_multiplier": 0.1,
    "residual_multiplier": 0.4,
    "logits_scaling": 3.0,
    "layer_types": ["linear_attention", "full_attention"],
    "mamba_n_heads": 8,
    "mamba_n_groups": 2,
    "mamba_d_state": 16,
}
_NEMOTRON = {
    "head_dim": 32,
    "mamba_num_heads": 8,
    "mamba_head_dim": 16,
    "n_groups": 4,
    "ssm_state_size": 16,
}


@dataclass(frozen=True)
class Kind:
    """A kind of model.

    Attributes:
        config: the name of its configuration's class, and what is not common in it.
        options: see there.
        architecture: llama.cpp's name.
        values: the keys of the file, without the architecture.
        convert: the tensors of the file.
        seed: of weights with which rounding changes no choice of an expert.
    """

    config: str
    options: Mapping[str, Any]
    architecture: str
    values: Callable[[Any], dict[str, Any]]
    convert: Callable[[Arrays, Any], Arrays]
    seed: int = 7


_NAMES = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.embeddings.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "model.norm_f.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
_PARTS = {
    "input_layernorm.weight": "attn_norm.weight",
    "norm.weight": "attn_norm.weight",
    "post_attention_layernorm.weight": "ffn_norm.weight",
    **{f"self_attn.{part}_proj.weight": f"attn_{part}.weight" for part in "qkv"},
    **{f"mixer.{part}_proj.weight": f"attn_{part}.weight" for part in "qkv"},
    "self_attn.o_proj.weight": "attn_output.weight",
    "mixer.o_proj.weight": "attn_output.weight",
    "self_attn.q_norm.weight": "attn_q_norm.weight",
    "self_attn.k_norm.weight": "attn_k_norm.weight",
    "self_attn.q_a_proj.weight": "attn_q_a.weight",
    "self_attn.q_b_proj.weight": "attn_q_b.weight",
    "self_attn.q_a_layernorm.weight": "attn_q_a_norm.weight",
    "self_attn.kv_a_proj_with_mqa.weight": "attn_kv_a_mqa.weight",
    "self_attn.kv_a_layernorm.weight": "attn_kv_a_norm.weight",
    **{f"mlp.{part}_proj.weight": f"ffn_{part}.weight" for part in ("gate", "up", "down")},
    **{f"mixer.{part}_proj.weight": f"ffn_{part}.weight" for part in ("up", "down")},
    **{f"{place}.gate.weight": "ffn_gate_inp.weight" for place in ("mlp", "mixer")},
    **{f"{place}.gate.e_score_correction_bias": "exp_probs_b.bias" for place in ("mlp", "mixer")},
    **{
        f"{place}.{part}_proj.weight": f"ffn_{part}_shexp.weight"
        for part in ("gate", "up", "down")
        for place in ("mlp.shared_experts", "mlp.shared_expert", "mixer.shared_experts")
    },
    "mlp.shared_expert_gate.weight": "ffn_gate_inp_shexp.weight",
    "block_sparse_moe.router.weight": "ffn_gate_inp.weight",
    **{f"{place}.experts.down_proj": "ffn_down_exps.weight" for place in ("mlp", "mixer", "block_sparse_moe")},
    "mixer.experts.up_proj": "ffn_up_exps.weight",
    **{f"{place}.in_proj.weight": "ssm_in.weight" for place in ("mixer", "mamba")},
    **{f"{place}.out_proj.weight": "ssm_out.weight" for place in ("mixer", "mamba", "linear_attn")},
    **{f"{place}.conv1d.bias": "ssm_conv1d.bias" for place in ("mixer", "mamba")},
    **{f"{place}.dt_bias": "ssm_dt.bias" for place in ("mixer", "mamba", "linear_attn")},
    "linear_attn.norm.weight": "ssm_norm.weight",
    "linear_attn.in_proj_qkv.weight": "attn_qkv.weight",
    "linear_attn.in_proj_z.weight": "attn_gate.weight",
    "linear_attn.in_proj_b.weight": "ssm_beta.weight",
    "linear_attn.in_proj_a.weight": "ssm_alpha.weight",
    "linear_attn.in_proj_ba.weight": "ssm_ba.weight",
    "layer_scalar": "layer_output_scale.weight",
    "router.proj.weight": "ffn_gate_inp.weight",
    "router.scale": "ffn_gate_inp.scale",
    "router.per_expert_scale": "ffn_down_exps.scale",
    "experts.gate_up_proj": "ffn_gate_up_exps.weight",
    "experts.down_proj": "ffn_down_exps.weight",
}
_GEMMA = {
    "post_attention_layernorm.weight": "post_attention_norm.weight",
    "pre_feedforward_layernorm.weight": "ffn_norm.weight",
    "post_feedforward_layernorm.weight": "post_ffw_norm.weight",
    "pre_feedforward_layernorm_2.weight": "pre_ffw_norm_2.weight",
    "post_feedforward_layernorm_1.weight": "post_ffw_norm_1.weight",
    "post_feedforward_layernorm_2.weight": "post_ffw_norm_2.weight",
}


def _renamed(state: Arrays, config: Any, parts: Mapping[str, str] = _PARTS) -> Arrays:
    """The tensors that only have other names, and those that all converters change alike."""
    found: Arrays = {}
    for name, array in state.items():
        match = re.fullmatch(r"model\.layers\.(\d+)\.(.+)", name)
        if match is None:
            found[_NAMES[name]] = array
            continue
        layer, part = f"blk.{match[1]}.", match[2]
        if part.endswith((".experts.gate_up_proj", "shared_mlp.input_linear.weight")):
            end = "_exps" if "experts" in part else "_shexp" if config.num_local_experts else ""
            gate, up = np.split(array, 2, axis=-2)
            found |= {f"{layer}ffn_gate{end}.weight": gate, f"{layer}ffn_up{end}.weight": up}
        elif part == "shared_mlp.output_linear.weight":
            found[f"{layer}ffn_down{'_shexp' if config.num_local_experts else ''}.weight"] = array
        elif part.endswith("conv1d.weight"):
            found[layer + "ssm_conv1d.weight"] = array[:, 0]
        elif part.endswith("A_log"):
            found[layer + "ssm_a"] = -np.exp(array) if "linear_attn" in part else -np.exp(array)[:, None]
        elif part.endswith(".D"):
            found[layer + "ssm_d"] = array[:, None]
        elif part in ("mixer.norm.weight", "mamba.norm.weight"):
            groups = config.n_groups if part.startswith("mixer") else config.mamba_n_groups
            found[layer + "ssm_norm.weight"] = array.reshape(groups, -1)
        else:
            found[layer + parts[part]] = array[0] if part == "mlp.shared_expert_gate.weight" else array
    return found


def _latent(state: Arrays, config: Any) -> Arrays:
    found = _renamed({name: array for name, array in state.items() if "kv_b_proj" not in name}, config)
    for index in range(config.num_hidden_layers):
        whole = state[f"model.layers.{index}.self_attn.kv_b_proj.weight"]
        by_head = whole.reshape(config.num_attention_heads, -1, config.kv_lora_rank)
        keys, values = np.split(by_head, [config.qk_nope_head_dim], axis=1)
        found |= {f"blk.{index}.attn_k_b.weight": keys.swapaxes(1, 2), f"blk.{index}.attn_v_b.weight": values}
    return found


def _whole_latent(state: Arrays, config: Any) -> Arrays:
    return _renamed(state, config, {**_PARTS, "self_attn.kv_b_proj.weight": "attn_kv_b.weight"})


def _latent_values(config: Any) -> dict[str, Any]:
    rope = config.rope_parameters
    scaling: dict[str, Any] = {}
    if rope["rope_type"] == "yarn":
        scaling = {
            "rope.scaling.type": "yarn",
            "rope.scaling.factor": rope["factor"],
            "rope.scaling.original_context_length": rope["original_max_position_embeddings"],
            "rope.scaling.yarn_log_multiplier": 0.1 * rope["mscale_all_dim"],
        }
    if "llama_4_scaling_beta" in rope:
        scaling["attention.temperature_scale"] = rope["llama_4_scaling_beta"]
        scaling["attention.temperature_length"] = rope["original_max_position_embeddings"]
    groups = {"expert_group_count": config.n_group, "expert_group_used_count": config.topk_group}
    return {
        **scaling,
        **(groups if config.n_group > 1 else {}),
        "attention.head_count_kv": 1,
        "attention.q_lora_rank": config.q_lora_rank,
        "attention.kv_lora_rank": config.kv_lora_rank,
        "attention.key_length": config.kv_lora_rank + config.qk_rope_head_dim,
        "attention.value_length": config.kv_lora_rank,
        "attention.key_length_mla": config.qk_nope_head_dim + config.qk_rope_head_dim,
        "attention.value_length_mla": config.v_head_dim,
        "rope.dimension_count": config.qk_rope_head_dim,
        "leading_dense_block_count": config.first_k_dense_replace,
        "expert_count": config.n_routed_experts,
        "expert_used_count": config.num_experts_per_tok,
        "expert_feed_forward_length": config.moe_intermediate_size,
        "expert_shared_count": config.n_shared_experts,
        "expert_weights_scale": config.routed_scaling_factor,
        "expert_weights_norm": config.model_type != "deepseek_v2",
        "expert_gating_func": 1 if config.model_type in ("deepseek_v2", "mistral4") else 2,
    }


def _whole_latent_values(config: Any) -> dict[str, Any]:
    return {key: value for key, value in _latent_values(config).items() if not key.endswith("_mla")} | {
        "attention.head_count_kv": config.num_attention_heads,
        "attention.key_length": config.qk_nope_head_dim + config.qk_rope_head_dim,
        "attention.value_length": config.v_head_dim,
    }


def _delta(state: Arrays, config: Any) -> Arrays:
    parts = {**_PARTS, "post_attention_layernorm.weight": "post_attention_norm.weight"}
    # These models have the weights of their norms less 1, but one.
    shifted = {
        name: array + 1 if name.endswith("norm.weight") and not name.endswith("linear_attn.norm.weight") else array
        for name, array in state.items()
    }
    return _renamed(shifted, config, parts)


def _next(state: Arrays, config: Any) -> Arrays:
    """The fused projection ordered by part, which the model has by key head."""
    keys, each = config.linear_num_key_heads, config.linear_num_value_heads // config.linear_num_key_heads
    sizes = [config.linear_key_head_dim] * 2 + [each * config.linear_value_head_dim] * 2
    found = {name: array for name, array in state.items() if "in_proj_qkvz" not in name}
    for name, array in state.items():
        if name.endswith("in_proj_qkvz.weight"):
            by_head = array.reshape(keys, -1, array.shape[1])
            parts = np.split(by_head, np.cumsum(sizes)[:-1], axis=1)
            queries, own, values, gates = (part.reshape(-1, array.shape[1]) for part in parts)
            stem = name.removesuffix("in_proj_qkvz.weight")
            found[stem + "in_proj_qkv.weight"] = np.concatenate([queries, own, values])
            found[stem + "in_proj_z.weight"] = gates
    return _delta(found, config)


def _next_by_head(state: Arrays, config: Any) -> Arrays:
    """The same as older converters left it."""
    fused = {name: array for name, array in state.items() if name.endswith("in_proj_qkvz.weight")}
    rest = {name: array for name, array in state.items() if name not in fused}
    layers = {int(name.split(".")[2]): array for name, array in fused.items()}
    return _delta(rest, config) | {f"blk.{layer}.ssm_in.weight": array for layer, array in layers.items()}


def _tiled(state: Arrays, config: Any) -> Arrays:
    """Value heads ordered by their place among those of a key head, and then by key head."""
    keys, each, size = config.linear_num_key_heads, 0, config.linear_value_head_dim
    each = config.linear_num_value_heads // keys
    first = 2 * keys * config.linear_key_head_dim

    def tile(array: Any, width: int) -> Any:
        return array.reshape(keys, each, width, *array.shape[1:]).swapaxes(0, 1).reshape(array.shape)

    found = {}
    for name, array in state.items():
        part = name.rpartition("linear_attn.")[2] if "linear_attn." in name else ""
        if part in ("in_proj_qkv.weight", "conv1d.weight"):
            array = np.concatenate([array[:first], tile(array[first:], size)])
        elif part == "in_proj_z.weight":
            array = tile(array, size)
        elif part in ("in_proj_a.weight", "in_proj_b.weight", "A_log", "dt_bias"):
            array = tile(array, 1)
        elif part == "out_proj.weight":
            array = np.ascontiguousarray(tile(array.T, size).T)
        found[name] = array
    return _delta(found, config)


def _delta_values(config: Any) -> dict[str, Any]:
    values: dict[str, Any] = {
        "attention.key_length": config.head_dim,
        "attention.value_length": config.head_dim,
        "rope.dimension_count": config.head_dim // 4,
        "full_attention_interval": 2,
        "ssm.conv_kernel": config.linear_conv_kernel_dim,
        "ssm.state_size": config.linear_key_head_dim,
        "ssm.group_count": config.linear_num_key_heads,
        "ssm.time_step_rank": config.linear_num_value_heads,
        "ssm.inner_size": config.linear_num_value_heads * config.linear_value_head_dim,
    }
    if config.model_type != "qwen3_next":
        values["rope.dimension_sections"] = [2, 1, 1, 0]
    if "experts" in config.to_dict() or hasattr(config, "num_experts"):
        values |= {
            "expert_count": config.num_experts,
            "expert_used_count": config.num_experts_per_tok,
            "expert_feed_forward_length": config.moe_intermediate_size,
            "expert_shared_feed_forward_length": config.shared_expert_intermediate_size,
        }
    return values


def _granite(state: Arrays, config: Any) -> Arrays:
    permuted = {}
    for name, array in state.items():
        if name.endswith(("self_attn.q_proj.weight", "self_attn.k_proj.weight")):
            heads = config.num_attention_heads if ".q_proj." in name else config.num_key_value_heads
            array = array.reshape(heads, 2, -1, array.shape[1]).swapaxes(1, 2).reshape(array.shape)
        permuted[name] = array
    return _renamed(permuted, config)


def _granite_values(config: Any) -> dict[str, Any]:
    values = {
        "attention.head_count_kv": [2 if kind == "full_attention" else 0 for kind in config.layer_types],
        "attention.scale": config.attention_multiplier,
        "embedding_scale": config.embedding_multiplier,
        "residual_scale": config.residual_multiplier,
        "logit_scale": config.logits_scaling,
        "rope.scaling.finetuned": config.position_embedding_type == "rope",
        "ssm.conv_kernel": config.mamba_d_conv,
        "ssm.state_size": config.mamba_d_state,
        "ssm.group_count": config.mamba_n_groups,
        "ssm.time_step_rank": config.mamba_n_heads,
        "ssm.inner_size": config.mamba_expand * config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "expert_shared_feed_forward_length": config.shared_intermediate_size,
    }
    if config.num_local_experts:
        values |= {"expert_count": config.num_local_experts, "expert_used_count": config.num_experts_per_tok}
    return values


def _nemotron_values(config: Any) -> dict[str, Any]:
    kinds = config.layers_block_type
    inner = config.moe_intermediate_size if "moe" in kinds else config.intermediate_size
    values = {
        "attention.head_count_kv": [2 if kind == "full_attention" else 0 for kind in kinds],
        "attention.key_length": config.head_dim,
        "attention.value_length": config.head_dim,
        "attention.layer_norm_epsilon": config.layer_norm_epsilon,
        "attention.layer_norm_rms_epsilon": config.layer_norm_epsilon,
        "feed_forward_length": [inner if kind in ("mlp", "moe") else 0 for kind in kinds],
        "ssm.conv_kernel": config.conv_kernel,
        "ssm.state_size": config.ssm_state_size,
        "ssm.group_count": config.n_groups,
        "ssm.time_step_rank": config.mamba_num_heads,
        "ssm.inner_size": config.mamba_num_heads * config.mamba_head_dim,
    }
    if "moe" in kinds:
        values |= {
            "expert_count": config.n_routed_experts,
            "expert_used_count": config.num_experts_per_tok,
            "expert_feed_forward_length": config.moe_intermediate_size,
            "expert_shared_feed_forward_length": config.moe_shared_expert_intermediate_size,
            "expert_shared_count": config.n_shared_experts,
            "expert_weights_scale": config.routed_scaling_factor,
            "expert_weights_norm": config.norm_topk_prob,
            "expert_group_count": config.n_group,
            "expert_group_used_count": config.topk_group,
        }
    return values


def _gemma4(state: Arrays, config: Any) -> Arrays:
    wide = 64
    factors = np.where(np.arange(wide // 2) < wide // 8, 1, 1e30).astype(np.float32)
    return _renamed(state, config, _PARTS | _GEMMA) | {"rope_freqs.weight": factors}


def _gemma4_values(config: Any) -> dict[str, Any]:
    slides = [kind == "sliding_attention" for kind in config.layer_types]
    full_heads = 1
    narrow = 32
    return {
        "feed_forward_length": config.intermediate_size,
        "attention.head_count_kv": [2 if slid else full_heads for slid in slides],
        "attention.sliding_window_pattern": slides,
        "attention.sliding_window": config.sliding_window,
        "attention.shared_kv_layers": 0,
        **{f"attention.{part}_length": 64 for part in ("key", "value")},
        **{f"attention.{part}_length_swa": narrow for part in ("key", "value")},
        "rope.dimension_count": 64,
        "rope.dimension_count_swa": narrow,
        "rope.freq_base": 1e6,
        "rope.freq_base_swa": 1e4,
        "embedding_length_per_layer_input": 0,
        # Without it, llama.cpp takes 30.
        "final_logit_softcapping": config.final_logit_softcapping,
        "expert_count": config.num_experts,
        "expert_used_count": config.top_k_experts,
        "expert_feed_forward_length": config.moe_intermediate_size,
    }


_V3 = {**_LATENT, "n_group": 4, "topk_group": 2, "rope_parameters": {**_YARN, "mscale": 0.8, "mscale_all_dim": 0.8}}
KINDS: Mapping[str, Kind] = {
    "deepseek-v2": Kind("DeepseekV2Config", _LATENT, "deepseek2", _latent_values, _latent),
    "deepseek-v3": Kind("DeepseekV3Config", _V3, "deepseek2", _latent_values, _latent),
    "deepseek-v3-whole": Kind("DeepseekV3Config", _V3, "deepseek2", _whole_latent_values, _whole_latent),
    "glm-4.7-flash": Kind("Glm4MoeLiteConfig", _LATENT, "deepseek2", _latent_values, _latent),
    "mistral4": Kind(
        "Mistral4Config",
        {
            **_LATENT,
            "rope_parameters": {**_YARN, "mscale": 1.0, "mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.3},
        },
        "mistral4",
        _latent_values,
        _latent,
        seed=8,
    ),
    "qwen3next": Kind("Qwen3NextConfig", {**_DELTA, **_EXPERTS}, "qwen3next", _delta_values, _next),
    "qwen3next-by-head": Kind("Qwen3NextConfig", {**_DELTA, **_EXPERTS}, "qwen3next", _delta_values, _next_by_head),
    "qwen35": Kind("Qwen3_5TextConfig", _DELTA, "qwen35", _delta_values, _tiled),
    "qwen35moe": Kind("Qwen3_5MoeTextConfig", {**_DELTA, **_EXPERTS}, "qwen35moe", _delta_values, _tiled),
    "granitehybrid": Kind(
        "GraniteMoeHybridConfig",
        {**_GRANITE, "num_local_experts": 0, "shared_intermediate_size": 192, "position_embedding_type": "rope"},
        "granitehybrid",
        _granite_values,
        _granite,
    ),
    "granitehybrid-experts": Kind(
        "GraniteMoeHybridConfig",
        {
            **_GRANITE,
            "num_local_experts": 6,
            "num_experts_per_tok": 2,
            "shared_intermediate_size": 96,
            "position_embedding_type": "nope",
        },
        "granitehybrid",
        _granite_values,
        _granite,
    ),
    "nemotron_h": Kind(
        "NemotronHConfig",
        {**_NEMOTRON, "layers_block_type": ["linear_attention", "full_attention", "mlp"]},
        "nemotron_h",
        _nemotron_values,
        _renamed,
    ),
    "nemotron_h_moe": Kind(
        "NemotronHConfig",
        {
            **_NEMOTRON,
            **{key: _V3[key] for key in ("n_routed_experts", "num_experts_per_tok", "n_group", "topk_group")},
            "moe_intermediate_size": 64,
            "moe_shared_expert_intermediate_size": 96,
            "routed_scaling_factor": 1.5,
            "layers_block_type": ["linear_attention", "full_attention", "moe"],
        },
        "nemotron_h_moe",
        _nemotron_values,
        _renamed,
    ),
    "gemma4-experts": Kind(
        "Gemma4TextConfig",
        {
            "head_dim": 32,
            "global_head_dim": 64,
            "sliding_window": 12,
            "layer_types": ["sliding_attention", "full_attention"],
            "hidden_size_per_layer_input": 0,
            "final_logit_softcapping": 3.0,
            "attention_k_eq_v": True,
            "num_global_key_value_heads": 1,
            "enable_moe_block": True,
            "num_experts": 6,
            "top_k_experts": 2,
            "moe_intermediate_size": 64,
        },
        "gemma4",
        _gemma4_values,
        _gemma4,
        seed=9,
    ),
}


def make_model(kind: Kind, vocabulary: int) -> Any:
    """A random model of transformers in float32."""
    config = getattr(transformers, kind.config)(**{**_COMMON, **kind.options, "vocab_size": vocabulary})
    torch.manual_seed(kind.seed)
    model_class = getattr(transformers, kind.config.replace("TextConfig", "Config").replace("Config", "ForCausalLM"))
    model = model_class._from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for name, parameter in (*model.named_parameters(), *model.named_buffers()):
            if name.endswith(("inv_freq", "embed_scale")):
                continue
            if "norm" in name.rsplit(".", 2)[-2] or name.endswith(("layer_scalar", "per_expert_scale", "router.scale")):
                center = (
                    0 if config.model_type.startswith("qwen3") and not name.endswith("linear_attn.norm.weight") else 1
                )
                value = center + 0.2 * torch.randn_like(parameter)
                if config.model_type.startswith("gemma4") and name.endswith("q_norm.weight"):
                    value *= 0.3
            elif parameter.dim() < 2:
                value = 0.3 * torch.randn_like(parameter)
            else:
                # Experts of clearly different scores, so that rounding changes no choice.
                is_router = name.endswith(("gate.weight", "router.weight", "router.proj.weight"))
                value = (4 if is_router else 1.5) * torch.randn_like(parameter) / parameter.shape[-1] ** 0.5
                value = (value * _GRID).round().clamp(-127, 127) / _GRID
            parameter.copy_(value)
    return model


def write_file(kind: Kind, model: Any, *, is_quantized: bool, tokens: Mapping[str, Any] | None = None) -> GgufSource:
    """The file of a model.

    Args:
        kind: of the model.
        model: as `make_model` makes it.
        is_quantized: matrices with rows of whole blocks are Q8_0; all others are F32.
        tokens: the metadata of the tokenizer.
    """
    config = model.config
    state = {name: array.detach().float().numpy() for name, array in model.state_dict().items() if "rotary" not in name}
    if config.tie_word_embeddings:
        del state["lm_head.weight"]
    values = {
        "block_count": config.num_hidden_layers,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": getattr(config, "intermediate_size", None),
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.to_dict()["num_key_value_heads"],
        "attention.layer_norm_rms_epsilon": getattr(config, "rms_norm_eps", None),
        "rope.freq_base": 10000.0,
        **kind.values(config),
    }
    named = {f"{kind.architecture}.{key}": value for key, value in values.items() if value is not None}
    source = GgufSource({"general.architecture": kind.architecture, **named, **(tokens or {})})
    for name, array in kind.convert(state, config).items():
        source.tensors.append(_tensor(name, array, is_quantized))
    return source


def _tensor(name: str, array: NDArray[np.float32], is_quantized: bool) -> tuple[str, tuple[int, ...], int, bytes]:
    is_matrix = array.ndim > 1 and array.shape[-1] % 32 == 0 and "norm" not in name
    if not is_quantized or not is_matrix:
        return name, array.shape, 0, np.ascontiguousarray(array, np.float32).tobytes()
    integers = np.ascontiguousarray(array * _GRID).reshape(-1, 32)
    assert (integers == integers.round()).all(), name
    blocks = np.empty((len(integers), 34), np.uint8)
    blocks[:, :2] = np.array([1 / _GRID], np.float16).view(np.uint8)
    blocks[:, 2:] = integers.astype(np.int8).view(np.uint8)
    return name, array.shape, 8, blocks.tobytes()


def tokens() -> dict[str, Any]:
    """The metadata of a small tokenizer."""
    original = trained("gpt-2")
    return values_of(original, "gpt2", pre="gpt-2", merges=merges_of(original))
