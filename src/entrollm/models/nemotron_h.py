"""Nemotron-H and Nemotron 3: a layer is a state space, attention without rotation, a feed-forward part or experts."""

from __future__ import annotations

from dataclasses import replace

from entrollm.errors import FormatError, UnsupportedError
from entrollm.models.config import Block, Experts, Mamba2, Mlp, ModelConfig, Names
from entrollm.models.config_fields import Fields
from entrollm.models.experts import read_corrected_experts
from entrollm.models.mamba2 import read_time_limits
from entrollm.models.read import Defaults, read_activation, read_decoder, refuse_flags

_DEFAULTS = Defaults(
    context_length=4096,
    head_dim=128,
    kv_heads=8,
    norm_eps=1e-5,
    bos_token_id=1,
    eos_token_id=2,
    activation="relu2",
    keys={"rms_norm_eps": "layer_norm_epsilon", "hidden_act": "mlp_hidden_act"},
)
_QKV = ("mixer.q_proj", "mixer.k_proj", "mixer.v_proj")
_MIXER = Block(qkv=_QKV, output="mixer.o_proj", attention_norm="norm", mlp_norm=None, has_mlp=False)
_FEED_FORWARD = Block(
    up=("mixer.up_proj",), down="mixer.down_proj", attention_norm=None, mlp_norm="norm", has_mixer=False
)
_MAMBA, _ATTENTION, _MLP, _EXPERTS = "mamba", "attention", "mlp", "moe"
_KINDS = {
    "linear_attention": _MAMBA,
    "mamba": _MAMBA,
    "full_attention": _ATTENTION,
    "attention": _ATTENTION,
    "mlp": _MLP,
    "moe": _EXPERTS,
}
_LETTERS = {"M": _MAMBA, "*": _ATTENTION, "-": _MLP, "E": _EXPERTS}
_MAX_KERNEL = 64


def read_config(fields: Fields) -> ModelConfig:
    """Read a nemotron_h config.json."""
    refuse_flags(fields, "use_bias")
    kinds = _read_kinds(fields)
    config = read_decoder(fields.updated(Fields({"num_hidden_layers": len(kinds)}, fields.source)), _DEFAULTS)
    if "moe_latent_size" in fields:
        raise UnsupportedError(f"{fields.source}: moe_latent_size is not supported")
    mamba = _read_mamba(fields)
    attention_bias = fields.flag("attention_bias", False)
    experts = _read_experts(fields) if _EXPERTS in kinds else None
    return replace(
        config,
        is_gated=False,
        layer_ropes=(None,) * len(kinds),
        qkv_bias=attention_bias,
        output_bias=attention_bias,
        mlp_bias=fields.flag("mlp_bias", False),
        layer_blocks=tuple(_MIXER if kind in (_MAMBA, _ATTENTION) else _FEED_FORWARD for kind in kinds),
        block=_FEED_FORWARD,
        mixers=tuple(mamba if kind == _MAMBA else None for kind in kinds),
        experts=tuple(experts if kind == _EXPERTS else None for kind in kinds),
        names=Names(embedding="backbone.embeddings.weight", layers="backbone.layers.", norm="backbone.norm_f"),
    )


def _read_kinds(fields: Fields) -> list[str]:
    """What each layer is, by hybrid_override_pattern or by a list of names."""
    if "hybrid_override_pattern" in fields:
        pattern = fields.text("hybrid_override_pattern")
        if not pattern or len(pattern) > 4096 or set(pattern) - _LETTERS.keys():
            raise fields.error("hybrid_override_pattern", f"letters of {''.join(_LETTERS)}")
        return [_LETTERS[letter] for letter in pattern]
    key = "layers_block_type" if "layers_block_type" in fields else "layer_types"
    value = fields.raw(key)
    if not isinstance(value, list) or not value or not all(kind in _KINDS for kind in value if isinstance(kind, str)):
        raise fields.error(key, f"a list of {', '.join(_KINDS)}")
    return [_KINDS[kind] for kind in fields.texts(key, len(value))]


def _read_mamba(fields: Fields) -> Mamba2:
    heads, groups = fields.integer("mamba_num_heads", 128), fields.integer("n_groups", 8)
    if heads % groups:
        raise FormatError(f"{fields.source}: mamba_num_heads {heads} is not a multiple of n_groups {groups}")
    return Mamba2(
        place="mixer",
        heads=heads,
        head_dim=fields.integer("mamba_head_dim", 64),
        groups=groups,
        state=fields.integer("ssm_state_size", 128),
        kernel=fields.integer("conv_kernel", 4, low=2, high=_MAX_KERNEL),
        has_bias=False,
        has_convolution_bias=fields.flag("use_conv_bias", True),
        activation=read_activation(fields, "mamba_hidden_act", "silu"),
        time_limits=read_time_limits(fields),
    )


def _read_experts(fields: Fields) -> Experts:
    read = read_corrected_experts(fields, count=8, used=2, size=7688, scale=1.0)
    size = fields.integer("moe_intermediate_size", 7688)
    shared = fields.integer("moe_shared_expert_intermediate_size", 7688)
    has_bias = fields.flag("mlp_bias", False)
    return replace(
        read,
        router="mixer.gate",
        expert=Mlp(up=("mixer.experts.{}.up_proj",), down="mixer.experts.{}.down_proj", size=size),
        stack=Mlp(up=("mixer.experts.up_proj.{}",), down="mixer.experts.down_proj.{}", size=size, suffix=""),
        routing=replace(read.routing, correction="mixer.gate.e_score_correction_bias"),
        shared=Mlp(
            up=("mixer.shared_experts.up_proj",),
            down="mixer.shared_experts.down_proj",
            size=shared,
            has_bias=has_bias,
        ),
    )
