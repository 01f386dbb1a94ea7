"""ERNIE 4.5: Llama with neighbouring features rotated together."""

from dataclasses import replace

from entrollm.models.config import ModelConfig
from entrollm.models.config_fields import Fields
from entrollm.models.read import Defaults, read_decoder

_DEFAULTS = Defaults(
    context_length=131072,
    head_dim=128,
    kv_heads=2,
    norm_eps=1e-5,
    theta=500000.0,
    tied=True,
    bos_token_id=1,
    eos_token_id=2,
)


def read_config(fields: Fields, defaults: Defaults = _DEFAULTS) -> ModelConfig:
    """Read an ernie4_5 config.json."""
    has_bias = fields.flag("use_bias", False)
    return replace(
        read_decoder(fields, defaults),
        has_rotated_neighbours=True,
        qkv_bias=has_bias,
        output_bias=has_bias,
        mlp_bias=has_bias,
    )
