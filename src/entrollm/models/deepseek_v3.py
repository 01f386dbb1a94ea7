"""DeepSeek V3 and R1, Kimi K2: latent attention, and experts chosen by corrected sigmoids within groups."""

from dataclasses import replace

from entrollm.models.config import ModelConfig
from entrollm.models.config_fields import Fields
from entrollm.models.experts import read_corrected_experts
from entrollm.models.latent import read_latent_decoder
from entrollm.models.read import Defaults
from entrollm.models.token_head import head_behind_layers

_DEFAULTS = Defaults(context_length=4096, bos_token_id=0, eos_token_id=1)


def read_config(fields: Fields) -> ModelConfig:
    """Read a deepseek_v3 config.json."""
    config = read_latent_decoder(fields, _DEFAULTS, ranks=(512, 1536), plain=128, rotated=64, value=128)
    experts = read_corrected_experts(fields, count=256, used=8, size=2048, scale=2.5, groups=(8, 4))
    dense = fields.integer("first_k_dense_replace", 3, low=0)
    return replace(
        config,
        experts=tuple(None if i < dense else experts for i in range(config.num_layers)),
        token_head=head_behind_layers(config),
    )
