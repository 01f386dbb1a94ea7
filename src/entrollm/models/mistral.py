"""Mistral: Llama with a sliding window."""

from dataclasses import replace

from entrollm.models.config import ModelConfig
from entrollm.models.config_fields import Fields
from entrollm.models.read import Defaults, read_decoder, uniform_windows

_DEFAULTS = Defaults(context_length=131072, kv_heads=8, bos_token_id=1, eos_token_id=2)
_WINDOW = 4096


def read_config(fields: Fields) -> ModelConfig:
    """Read a mistral config.json."""
    config = read_decoder(fields, _DEFAULTS)
    return replace(config, windows=uniform_windows(fields, config.num_layers, _WINDOW))
