"""Qwen3 (dense): normalised queries and keys, a head size of its own, sliding windows in the upper layers."""

from dataclasses import replace

from entrollm.models.config import ModelConfig
from entrollm.models.config_fields import Fields
from entrollm.models.read import Defaults, layered_windows, read_decoder

_DEFAULTS = Defaults(context_length=32768, head_dim=128, kv_heads=32)


def read_config(fields: Fields) -> ModelConfig:
    """Read a qwen3 config.json."""
    config = read_decoder(fields, _DEFAULTS)
    attention_bias = fields.flag("attention_bias", False)
    return replace(
        config,
        qk_norm="head",
        qkv_bias=attention_bias,
        output_bias=attention_bias,
        windows=layered_windows(fields, config.num_layers),
    )
