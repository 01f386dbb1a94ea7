"""Qwen3.5 with experts (text)."""

from dataclasses import replace

from entrollm.models.config import ModelConfig
from entrollm.models.config_fields import Fields
from entrollm.models.gated_delta import read_delta_decoder
from entrollm.models.qwen3_next import read_experts
from entrollm.models.read import Defaults

_DEFAULTS = Defaults(
    context_length=32768, head_dim=256, kv_heads=2, partial_rotary=0.25, sizes={"intermediate_size": 512}
)


def read_config(fields: Fields) -> ModelConfig:
    """Read a qwen3_5_moe_text config.json, or the text_config of a qwen3_5_moe one."""
    config = read_delta_decoder(fields, _DEFAULTS, is_by_head=False)
    experts = read_experts(fields, count=256, used=8, normalises=True)
    return replace(config, experts=(experts,) * config.num_layers)
