"""Phi-3, Phi-3.5 and Phi-4 (mini): fused projections, longrope and partial rotation."""

from dataclasses import replace

from entrollm.models.config import Defaults, ModelConfig, read_decoder, uniform_windows
from entrollm.models.config_fields import Fields

# Older checkpoints call longrope "su" or "yarn".
_DEFAULTS = Defaults(norm_eps=1e-5, partial_rotary=True, rope_aliases={"su": "longrope", "yarn": "longrope"})


def read_config(fields: Fields) -> ModelConfig:
    """Read a phi3 config.json."""
    config = read_decoder(fields, _DEFAULTS)
    return replace(config, fused=True, windows=uniform_windows(fields, config.num_layers))
