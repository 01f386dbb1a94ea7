"""The architectures of GGUF files in which most layers are linear: Qwen3-Next, Qwen3.5, Granite 4, Nemotron-H."""

from __future__ import annotations

import re
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import numpy as np

from entrollm.checkpoint.gguf_architecture import FULL, GRANITE_FACTORS, Architecture, Values, granite_factors
from entrollm.checkpoint.gguf_changes import SPLIT_EXPERTS, Change, Changes, Joined, Order, Rows, flat, logarithms
from entrollm.checkpoint.gguf_mixtures import MIXTURES

_LINEAR = "linear_attention"
_SSM_KEYS = frozenset({"ssm.conv_kernel", "ssm.inner_size", "ssm.state_size", "ssm.time_step_rank", "ssm.group_count"})
_INTERVAL = 4
# Rows of a projection; their order is made from what the file claims.
_MAX_ROWS = 2**20
_GUESSING = re.compile(r"model\.layers\.(\d+)\.(.+)")
# The layer that guesses tokens.
_NEXT = {
    "nextn.eh_proj": "eh_proj",
    "nextn.enorm": "enorm",
    "nextn.hnorm": "hnorm",
    "nextn.shared_head_norm": "shared_head.norm",
}
_HEAD_NAMES = {
    "eh_proj.weight": "mtp.fc.weight",
    "enorm.weight": "mtp.pre_fc_norm_embedding.weight",
    "hnorm.weight": "mtp.pre_fc_norm_hidden.weight",
    "shared_head.norm.weight": "mtp.norm.weight",
}


def _delta(values: Values, config: dict[str, Any]) -> dict[str, Any]:
    """What Qwen3-Next and Qwen3.5 have in common."""
    layers, heads = config["num_hidden_layers"], values.integer("ssm.time_step_rank")
    inner = values.integer("ssm.inner_size")
    if inner % heads or heads % values.integer("ssm.group_count"):
        raise values.unsupported("ssm.time_step_rank")
    if inner > _MAX_ROWS or values.integer("ssm.group_count") * values.integer("ssm.state_size") > _MAX_ROWS:
        raise values.unsupported("ssm.inner_size" if inner > _MAX_ROWS else "ssm.state_size")
    if values.has("attention.recurrent_layers"):
        linear = values.flags("attention.recurrent_layers", values.integer("block_count"))[:layers]
    else:
        interval = values.integer("full_attention_interval", _INTERVAL)
        linear = [(index + 1) % interval != 0 for index in range(layers)]
    if values.integer("nextn_predict_layers", 0, low=0) > 1:
        raise values.unsupported("nextn_predict_layers")
    rope = config["rope_parameters"]
    if values.has("rope.dimension_sections"):
        # Of the features that are rotated, how many by each coordinate of an image; for text, all are the position.
        sections = values.integers("rope.dimension_sections", 4)
        if 2 * sum(sections) != round(rope["partial_rotary_factor"] * config["head_dim"]):
            raise values.unsupported("rope.dimension_sections")
        rope = rope | {"mrope_section": sections[:3], "mrope_interleaved": True}
    return {
        "layer_types": [_LINEAR if is_linear else FULL for is_linear in linear],
        "linear_num_key_heads": values.integer("ssm.group_count"),
        "linear_key_head_dim": values.integer("ssm.state_size"),
        "linear_num_value_heads": heads,
        "linear_value_head_dim": inner // heads,
        "linear_conv_kernel_dim": values.integer("ssm.conv_kernel", low=2),
        "attention_bias": False,
        "rope_parameters": rope,
        "num_nextn_predict_layers": values.integer("nextn_predict_layers", 0, low=0),
    }


def _delta_moe(values: Values, config: dict[str, Any]) -> dict[str, Any]:
    shared = values.integer("expert_shared_feed_forward_length", config["intermediate_size"])
    return {
        **_delta(values, config),
        "num_experts": values.integer("expert_count"),
        "num_experts_per_tok": values.integer("expert_used_count"),
        "moe_intermediate_size": values.integer("expert_feed_forward_length"),
        "shared_expert_intermediate_size": shared,
    }


def _by_key_head(config: Mapping[str, Any]) -> Changes:
    """The projections of Qwen3-Next, of which older files have one that is ordered by key head."""
    keys, each = config["linear_num_key_heads"], config["linear_num_value_heads"] // config["linear_num_key_heads"]
    key_dim, value_dim = config["linear_key_head_dim"], each * config["linear_value_head_dim"]
    pairs = np.arange(2 * keys * each).reshape(keys, 2, each)
    rows = np.arange(2 * keys * (key_dim + value_dim)).reshape(keys, -1)
    queries, own, mixed, gates = np.split(rows, np.cumsum([key_dim, key_dim, value_dim]), axis=1)
    return {
        "ssm_ba.weight": {
            "linear_attn.in_proj_b.weight": Rows(rows=pairs[:, 0].reshape(-1), total=pairs.size),
            "linear_attn.in_proj_a.weight": Rows(rows=pairs[:, 1].reshape(-1), total=pairs.size),
        },
        "ssm_in.weight": {
            "linear_attn.in_proj_qkv.weight": Rows(
                rows=np.concatenate([part.reshape(-1) for part in (queries, own, mixed)]), total=rows.size
            ),
            "linear_attn.in_proj_z.weight": Rows(rows=gates.reshape(-1), total=rows.size),
        },
        "ssm_a": {"linear_attn.A_log": logarithms()},
        **SPLIT_EXPERTS,
    }


def _by_place(config: Mapping[str, Any]) -> Changes:
    """The tensors of Qwen3.5 whose value heads are ordered by their place among those of a key head.

    The model has all value heads of a key head together.
    """
    keys, each = config["linear_num_key_heads"], config["linear_num_value_heads"] // config["linear_num_key_heads"]
    value_dim = config["linear_value_head_dim"]

    def order(size: int) -> Order:
        return np.arange(each * keys * size).reshape(each, keys, size).swapaxes(0, 1).reshape(-1)

    values, heads, first = order(value_dim), order(1), 2 * keys * config["linear_key_head_dim"]
    mixed = np.concatenate([np.arange(first), first + values])
    columns = np.argsort(values) if each > 1 else None
    return {
        "attn_qkv.weight": {"linear_attn.in_proj_qkv.weight": Rows(rows=mixed)},
        "attn_gate.weight": {"linear_attn.in_proj_z.weight": Rows(rows=values)},
        "ssm_beta.weight": {"linear_attn.in_proj_b.weight": Rows(rows=heads)},
        "ssm_alpha.weight": {"linear_attn.in_proj_a.weight": Rows(rows=heads)},
        "ssm_conv1d.weight": {"linear_attn.conv1d.weight": Rows(rows=mixed)},
        "ssm_dt.bias": {"linear_attn.dt_bias": Rows(rows=heads)},
        "ssm_a": {"linear_attn.A_log": logarithms(heads)},
        "ssm_out.weight": {"linear_attn.out_proj.weight": Rows(columns=columns)},
        **SPLIT_EXPERTS,
    }


def _head_names(name: str, config: Mapping[str, Any]) -> str:
    """The names of the layer that guesses tokens, which these checkpoints have apart."""
    match = _GUESSING.fullmatch(name)
    if match is None or int(match[1]) < config["num_hidden_layers"]:
        return name
    return _HEAD_NAMES.get(match[2], f"mtp.layers.0.{match[2]}")


_DELTA_PARTS = {
    "post_attention_norm": "post_attention_layernorm",
    "attn_qkv": "linear_attn.in_proj_qkv",
    "attn_gate": "linear_attn.in_proj_z",
    "ssm_conv1d": "linear_attn.conv1d",
    "ssm_norm": "linear_attn.norm",
    "ssm_out": "linear_attn.out_proj",
    **_NEXT,
}
_DELTA_KEYS = _SSM_KEYS | {
    *("full_attention_interval", "attention.recurrent_layers", "rope.dimension_sections", "nextn_predict_layers")
}
_QWEN = MIXTURES["qwen2moe"]


def _qwen(model_type: str, class_name: str, *, has_experts: bool, is_by_key_head: bool = False) -> Architecture:
    return Architecture(
        model_type=model_type,
        class_name=class_name,
        extend=_delta_moe if has_experts else _delta,
        keys=_DELTA_KEYS | (_QWEN.keys if has_experts else frozenset()),
        parts={**_DELTA_PARTS, **(_QWEN.parts if has_experts else {})},
        whole_names={"ssm_dt.bias": "linear_attn.dt_bias"},
        rows=_QWEN.rows,
        kernels=("conv1d.weight",),
        rotates_part=True,
        norm_offset=1.0,
        plain_norms=("linear_attn.norm.weight",),
        has_qk_norms=True,
        changes=_by_key_head if is_by_key_head else _by_place,
        final_name=_head_names,
    )


def _state_space(values: Values) -> tuple[int, int]:
    """The heads of a Mamba-2 layer, and their features."""
    inner, heads = values.integer("ssm.inner_size"), values.integer("ssm.time_step_rank")
    if inner % heads:
        raise values.unsupported("ssm.time_step_rank")
    return heads, inner // heads


def _state_space_changes(place: str) -> dict[str, Mapping[str, Change]]:
    return {
        "ssm_a": {f"{place}.A_log": logarithms()},
        "ssm_d": {f"{place}.D": flat()},
        "ssm_norm.weight": {f"{place}.norm.weight": flat()},
    }


def _state_space_parts(place: str) -> dict[str, str]:
    return {"ssm_in": f"{place}.in_proj", "ssm_conv1d": f"{place}.conv1d", "ssm_out": f"{place}.out_proj"}


def _granite_hybrid(values: Values, config: dict[str, Any]) -> dict[str, Any]:
    layers = config["num_hidden_layers"]
    heads, head_dim = _state_space(values)
    attends = values.integers("attention.head_count_kv", layers)
    count = values.integer("expert_count", 0, low=0)
    size = config["intermediate_size"]
    if count:
        size = values.integer("expert_shared_feed_forward_length", 0, low=0)
    if values.integer("ssm.inner_size") % config["hidden_size"]:
        raise values.unsupported("ssm.inner_size")
    values.expect("attention.value_length", config["head_dim"], "the keys' length")
    rotates = values.flag("rope.scaling.finetuned", True)
    if rotates:
        values.expect("rope.dimension_count", config["head_dim"], "the heads' length, of which all is rotated")
    return {
        **granite_factors(values, config),
        "layer_types": [FULL if kv_heads else _LINEAR for kv_heads in attends],
        "position_embedding_type": "rope" if rotates else "nope",
        "num_experts": count,
        "num_local_experts": count,
        "num_experts_per_tok": values.integer("expert_used_count", 0, low=0),
        "shared_intermediate_size": size,
        "mamba_n_heads": heads,
        "mamba_d_head": head_dim,
        "mamba_n_groups": values.integer("ssm.group_count"),
        "mamba_d_state": values.integer("ssm.state_size"),
        "mamba_d_conv": values.integer("ssm.conv_kernel", low=2),
        "mamba_expand": values.integer("ssm.inner_size") // config["hidden_size"],
        "mamba_conv_bias": _has_kernel_bias(values, attends),
        "mamba_proj_bias": False,
    }


def _has_kernel_bias(values: Values, attends: list[int]) -> bool:
    """Whether the convolution of the first layer without attention has a bias."""
    return any(values.has_tensor(f"blk.{index}.ssm_conv1d.bias") for index, heads in enumerate(attends) if not heads)


def _granite_changes(config: Mapping[str, Any]) -> Changes:
    end = "shexp" if config["num_local_experts"] else ""
    gate, up, down = (f"ffn_{part}{'_' if end else ''}{end}.weight" for part in ("gate", "up", "down"))
    found = {
        **_state_space_changes("mamba"),
        gate: {"shared_mlp.input_linear.weight": Joined(others=(up,))},
        down: {"shared_mlp.output_linear.weight": Rows()},
    }
    if config["num_local_experts"]:
        place = "block_sparse_moe"
        found["ffn_gate_exps.weight"] = {f"{place}.input_linear.weight.{{}}": Joined(others=("ffn_up_exps.weight",))}
        found["ffn_down_exps.weight"] = {f"{place}.output_linear.weight.{{}}": Rows()}
    return found


def _nemotron_h(values: Values, config: dict[str, Any]) -> dict[str, Any]:
    layers = config["num_hidden_layers"]
    heads, head_dim = _state_space(values)
    attends = values.integers("attention.head_count_kv", layers)
    sizes = values.integers("feed_forward_length", layers)
    values.expect("attention.value_length", config["head_dim"], "the keys' length")
    found: dict[str, Any] = {}
    if values.integer("expert_count", 0, low=0):
        found = _nemotron_experts(values)
    kinds = []
    for index, (kv_heads, size) in enumerate(zip(attends, sizes, strict=True)):
        # llama.cpp looks at the features first, and the experts are told by their router.
        routed = values.has_tensor(f"blk.{index}.ffn_gate_inp.weight")
        kinds.append("moe" if routed else "mlp" if size else FULL if kv_heads else _LINEAR)
    return {
        **found,
        "layers_block_type": kinds,
        "layer_norm_epsilon": config["rms_norm_eps"],
        "mlp_hidden_act": "relu2",
        "mamba_num_heads": heads,
        "mamba_head_dim": head_dim,
        "n_groups": values.integer("ssm.group_count"),
        "ssm_state_size": values.integer("ssm.state_size"),
        "conv_kernel": values.integer("ssm.conv_kernel", low=2),
        "use_conv_bias": any(values.has_tensor(f"blk.{index}.ssm_conv1d.bias") for index in range(layers)),
    }


def _nemotron_experts(values: Values) -> dict[str, Any]:
    size, count = values.integer("expert_feed_forward_length"), values.integer("expert_count")
    # 2 is llama.cpp's number of sigmoids, which it takes whatever the file says.
    values.expect("expert_gating_func", 2, "sigmoids")
    return {
        "num_experts": count,
        "n_routed_experts": count,
        "num_experts_per_tok": values.integer("expert_used_count"),
        "n_shared_experts": values.integer("expert_shared_count", 1),
        "moe_intermediate_size": size,
        "moe_shared_expert_intermediate_size": values.integer("expert_shared_feed_forward_length", size),
        "routed_scaling_factor": values.number("expert_weights_scale", 0.0) or 1.0,
        "norm_topk_prob": values.flag("expert_weights_norm", False),
        "n_group": values.integer("expert_group_count", 1, low=0) or 1,
        "topk_group": values.integer("expert_group_used_count", 1, low=0) or 1,
    }


def _backbone(name: str, config: Mapping[str, Any]) -> str:
    return name.replace("model.layers.", "backbone.layers.", 1)


_GLM_KEYS = MIXTURES["glm4moe"].keys - {"nextn_predict_layers", "leading_dense_block_count"}
_NEMOTRON_H = Architecture(
    model_type="nemotron_h",
    class_name="NemotronHForCausalLM",
    extend=_nemotron_h,
    keys=_SSM_KEYS | _GLM_KEYS | {"expert_shared_feed_forward_length"},
    parts={
        "attn_norm": "norm",
        **{f"attn_{part}": f"mixer.{part}_proj" for part in "qkv"},
        "attn_output": "mixer.o_proj",
        "ffn_up": "mixer.up_proj",
        "ffn_down": "mixer.down_proj",
        "ffn_gate_inp": "mixer.gate",
        "ffn_up_exps": "mixer.experts.{}.up_proj",
        "ffn_down_exps": "mixer.experts.{}.down_proj",
        "ffn_up_shexp": "mixer.shared_experts.up_proj",
        "ffn_down_shexp": "mixer.shared_experts.down_proj",
        **_state_space_parts("mixer"),
    },
    whole_names={"ssm_dt.bias": "mixer.dt_bias", "exp_probs_b.bias": "mixer.gate.e_score_correction_bias"},
    kernels=("conv1d.weight",),
    outer={"token_embd": "backbone.embeddings", "output_norm": "backbone.norm_f"},
    has_layer_sizes=True,
    loose_biases=("mixer.conv1d.bias",),
    has_own_heads=True,
    changes=lambda config: _state_space_changes("mixer"),
    final_name=_backbone,
)
HYBRIDS: Mapping[str, Architecture] = MappingProxyType(
    {
        # The same model as Qwen3.5 with experts, whose projections are not fused either.
        "qwen3next": _qwen("qwen3_5_moe_text", "Qwen3_5MoeForCausalLM", has_experts=True, is_by_key_head=True),
        "qwen35": _qwen("qwen3_5_text", "Qwen3_5ForCausalLM", has_experts=False),
        "qwen35moe": _qwen("qwen3_5_moe_text", "Qwen3_5MoeForCausalLM", has_experts=True),
        "granitehybrid": Architecture(
            model_type="granitemoehybrid",
            class_name="GraniteMoeHybridForCausalLM",
            extend=_granite_hybrid,
            keys=_SSM_KEYS
            | GRANITE_FACTORS
            | {"expert_count", "expert_used_count", "expert_shared_feed_forward_length", "rope.scaling.finetuned"},
            parts={"ffn_gate_inp": "block_sparse_moe.router.layer", **_state_space_parts("mamba")},
            whole_names={"ssm_dt.bias": "mamba.dt_bias"},
            kernels=("conv1d.weight",),
            interleaves=True,
            has_layer_sizes=True,
            loose_biases=("mamba.conv1d.bias",),
            has_own_heads=True,
            changes=_granite_changes,
        ),
        "nemotron_h": _NEMOTRON_H,
        "nemotron_h_moe": _NEMOTRON_H,
    }
)
