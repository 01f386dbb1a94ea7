"""Seed-OSS: Llama with a head size of its own and biases on q, k and v."""

from dataclasses import replace

from entrollm.models.config import ModelConfig
from entrollm.models.config_fields import Fields
from entrollm.models.read import Defaults, read_decoder

_DEFAULTS = Defaults(context_length=524288, head_dim=128, kv_heads=8, bos_token_id=0, eos_token_id=2)


def read_config(fields: Fields) -> ModelConfig:
    """Read a seed_oss config.json."""
    return replace(
        read_decoder(fields, _DEFAULTS),
        qkv_bias=fields.flag("attention_bias", True),
        output_bias=fields.flag("attention_out_bias", False),
        mlp_bias=fields.flag("mlp_bias", False),
    )
