"""Ministral: Mistral whose layers may differ in their windows."""

from dataclasses import replace

from entrollm.models.config import ModelConfig
from entrollm.models.config_fields import Fields
from entrollm.models.read import FULL, SLIDING, Defaults, layer_kinds, read_decoder, windows_of

_DEFAULTS = Defaults(context_length=131072, kv_heads=8, bos_token_id=1, eos_token_id=2)
_WINDOW = 4096


def read_config(fields: Fields) -> ModelConfig:
    """Read a ministral config.json."""
    config = read_decoder(fields, _DEFAULTS)
    slides = fields.optional_integer("sliding_window", _WINDOW, high=2**31) is not None
    kinds = layer_kinds(fields, config.num_layers) or [SLIDING if slides else FULL] * config.num_layers
    return replace(config, windows=windows_of(fields, kinds, _WINDOW))
