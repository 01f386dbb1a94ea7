"""Qwen2 and Qwen2.5: Llama with biases on q, k and v, and sliding windows in the upper layers."""

from dataclasses import replace

from entrollm.models.config import ModelConfig
from entrollm.models.config_fields import Fields
from entrollm.models.read import Defaults, layered_windows, read_decoder

_DEFAULTS = Defaults(context_length=32768, kv_heads=32)


def read_config(fields: Fields) -> ModelConfig:
    """Read a qwen2 config.json."""
    config = read_decoder(fields, _DEFAULTS)
    return replace(config, qkv_bias=True, windows=layered_windows(fields, config.num_layers))
