"""Granite 4: state-space layers and attention, with experts or without."""

from __future__ import annotations

from dataclasses import replace

from entrollm.errors import FormatError, UnsupportedError
from entrollm.models import granite
from entrollm.models.config import Block, Experts, Mamba2, ModelConfig
from entrollm.models.config_fields import Fields
from entrollm.models.granitemoe import read_experts
from entrollm.models.granitemoeshared import with_shared
from entrollm.models.mamba2 import read_time_limits

_BLOCK = Block(up=("shared_mlp.input_linear",), down="shared_mlp.output_linear")
_ATTENTION = ("attention", "full_attention")
_STATE_SPACE = ("mamba", "linear_attention")
_MAX_KERNEL = 64


def read_config(fields: Fields) -> ModelConfig:
    """Read a granitemoehybrid config.json."""
    config = replace(granite.read_config(fields), mlp_bias=False)
    kinds = fields.texts("layer_types", config.num_layers) if "layer_types" in fields else None
    kinds = kinds or [_STATE_SPACE[0]] * config.num_layers
    for kind in kinds:
        if kind not in _ATTENTION + _STATE_SPACE:
            raise UnsupportedError(
                f"{fields.source}: layer type {kind!r:.40} is not supported; supported: attention, mamba"
            )
    form = _read_mamba(fields, config) if set(kinds) & set(_STATE_SPACE) else None
    experts: tuple[Experts | None, ...] = ()
    if fields.integer("num_local_experts", 8, low=0):
        shared = fields.only("shared_intermediate_size")
        shared = shared if "shared_intermediate_size" in shared else Fields(_SHARED, fields.source)
        experts = (with_shared(shared, read_experts(fields, config)),) * config.num_layers
    rotates = fields.text("position_embedding_type", "nope") == "rope"
    return replace(
        config,
        block=_BLOCK,
        layer_ropes=() if rotates else (None,) * config.num_layers,
        intermediate_size=fields.integer("shared_intermediate_size", _SHARED["shared_intermediate_size"]),
        mixers=tuple(form if kind in _STATE_SPACE else None for kind in kinds) if form else (),
        experts=experts,
    )


_SHARED = {"shared_intermediate_size": 1024}


def _read_mamba(fields: Fields, config: ModelConfig) -> Mamba2:
    inner = fields.integer("mamba_expand", 2) * config.hidden_size
    heads, groups = fields.integer("mamba_n_heads", 128), fields.integer("mamba_n_groups", 1)
    head_dim = inner // heads
    if fields.raw("mamba_d_head") != "auto":
        head_dim = fields.integer("mamba_d_head", head_dim)
    if heads * head_dim != inner or heads % groups:
        raise FormatError(
            f"{fields.source}: mamba_n_heads {heads} of {head_dim} features, in {groups} groups, do not share the "
            f"{inner} features of a state-space layer"
        )
    return Mamba2(
        place="mamba",
        heads=heads,
        head_dim=head_dim,
        groups=groups,
        state=fields.integer("mamba_d_state", 256),
        kernel=fields.integer("mamba_d_conv", 4, low=2, high=_MAX_KERNEL),
        has_bias=fields.flag("mamba_proj_bias", False),
        has_convolution_bias=fields.flag("mamba_conv_bias", True),
        activation=config.activation,
        time_limits=read_time_limits(fields),
    )
