"""Nemotron: LayerNorm with weights stored less one, half of each head rotated, squared ReLU without a gate."""

from dataclasses import replace

from entrollm.models.config import Block, ModelConfig, Norm
from entrollm.models.config_fields import Fields
from entrollm.models.read import Defaults, read_decoder

_DEFAULTS = Defaults(
    context_length=4096,
    norm_eps=1e-5,
    bos_token_id=2,
    eos_token_id=3,
    activation="relu2",
    partial_rotary=0.5,
    keys={"rms_norm_eps": "norm_eps"},
)


def read_config(fields: Fields) -> ModelConfig:
    """Read a nemotron config.json."""
    attention_bias = fields.flag("attention_bias", False)
    return replace(
        read_decoder(fields, _DEFAULTS),
        norm=Norm(is_centered=True, weight_offset=1.0, has_bias=True),
        block=Block(up=("mlp.up_proj",)),
        is_gated=False,
        qkv_bias=attention_bias,
        output_bias=attention_bias,
        mlp_bias=fields.flag("mlp_bias", False),
    )
