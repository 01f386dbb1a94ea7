"""Qwen3.5 (text): gated delta layers with projections of their own, and gated attention."""

from entrollm.models.config import ModelConfig
from entrollm.models.config_fields import Fields
from entrollm.models.gated_delta import read_delta_decoder
from entrollm.models.read import Defaults

_DEFAULTS = Defaults(context_length=32768, head_dim=256, kv_heads=4, partial_rotary=0.25)


def read_config(fields: Fields) -> ModelConfig:
    """Read a qwen3_5_text config.json, or the text_config of a qwen3_5 one."""
    return read_delta_decoder(fields, _DEFAULTS, is_by_head=False)
