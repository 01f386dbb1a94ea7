"""Mistral: Llama with a sliding window."""

from dataclasses import replace

from entrollm.models.config import Defaults, ModelConfig, read_decoder, uniform_windows
from entrollm.models.config_fields import Fields


def read_config(fields: Fields) -> ModelConfig:
    """Read a mistral config.json."""
    config = read_decoder(fields, Defaults(kv_heads=8))
    return replace(config, windows=uniform_windows(fields, config.num_layers))
