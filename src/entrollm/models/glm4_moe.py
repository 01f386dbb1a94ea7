"""GLM-4.5 to 4.7: experts chosen by corrected sigmoids, and half of each head rotated."""

from dataclasses import replace

from entrollm.models.config import ModelConfig
from entrollm.models.config_fields import Fields
from entrollm.models.experts import read_corrected_experts
from entrollm.models.read import Defaults, read_decoder
from entrollm.models.token_head import head_behind_layers

_DEFAULTS = Defaults(context_length=131072, kv_heads=8, norm_eps=1e-5, partial_rotary=0.5)


def read_config(fields: Fields) -> ModelConfig:
    """Read a glm4_moe config.json."""
    config = read_decoder(fields, _DEFAULTS)
    experts = read_corrected_experts(fields, count=128, used=8, size=1408, scale=1.0)
    dense = fields.integer("first_k_dense_replace", 1, low=0)
    return replace(
        config,
        qkv_bias=fields.flag("attention_bias", False),
        qk_norm="head" if fields.flag("use_qk_norm", False) else "",
        experts=tuple(None if index < dense else experts for index in range(config.num_layers)),
        token_head=head_behind_layers(config),
    )
