"""What the config.json files of models with gated delta layers have in common."""

from __future__ import annotations

from dataclasses import replace

from entrollm.errors import FormatError, UnsupportedError
from entrollm.models.config import GatedDelta, ModelConfig, Norm
from entrollm.models.config_fields import Fields
from entrollm.models.read import FULL, Defaults, read_decoder
from entrollm.models.token_head import head_of_its_own

_LINEAR = "linear_attention"
_MAX_KERNEL = 64


def read_delta_decoder(fields: Fields, defaults: Defaults, *, is_by_head: bool) -> ModelConfig:
    """Read a decoder of gated delta layers and, every few layers, gated attention.

    Args:
        fields: of config.json.
        defaults: of the architecture.
        is_by_head: the fused projections of the delta layers are ordered by key head.
    Raises:
        FormatError, UnsupportedError: as for `read_decoder`.
    """
    config = read_decoder(fields, defaults)
    form = GatedDelta(
        key_heads=fields.integer("linear_num_key_heads", 16),
        key_dim=fields.integer("linear_key_head_dim", 128),
        value_heads=fields.integer("linear_num_value_heads", 32),
        value_dim=fields.integer("linear_value_head_dim", 128),
        kernel=fields.integer("linear_conv_kernel_dim", 4, low=2, high=_MAX_KERNEL),
        is_by_head=is_by_head,
    )
    if form.value_heads % form.key_heads:
        raise FormatError(
            f"{fields.source}: linear_num_value_heads {form.value_heads} is not a multiple of linear_num_key_heads "
            f"{form.key_heads}"
        )
    if config.activation != "silu":
        raise UnsupportedError(f"{fields.source}: hidden_act other than silu is not supported for this model type")
    attention_bias = fields.flag("attention_bias", False)
    config = replace(
        config,
        norm=Norm(weight_offset=1.0),
        qk_norm="head",
        has_output_gate=True,
        qkv_bias=attention_bias,
        output_bias=attention_bias,
        mixers=tuple(None if kind == FULL else form for kind in _kinds(fields, config.num_layers)),
    )
    return replace(config, token_head=head_of_its_own(config))


def _kinds(fields: Fields, num_layers: int) -> list[str]:
    if "layer_types" not in fields:
        interval = fields.integer("full_attention_interval", 4)
        return [_LINEAR if (index + 1) % interval else FULL for index in range(num_layers)]
    kinds = fields.texts("layer_types", num_layers)
    for kind in kinds:
        if kind not in (_LINEAR, FULL):
            raise UnsupportedError(
                f"{fields.source}: layer type {kind!r:.40} is not supported; supported: {_LINEAR}, {FULL}"
            )
    return kinds
