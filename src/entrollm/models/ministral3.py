"""Ministral 3: Mistral with yarn, and queries that grow with their position."""

from dataclasses import replace

from entrollm.models.config import ModelConfig
from entrollm.models.config_fields import Fields
from entrollm.models.read import Defaults, read_decoder, uniform_windows
from entrollm.models.rope import with_query_growth

_DEFAULTS = Defaults(context_length=262144, head_dim=128, kv_heads=8, norm_eps=1e-5, bos_token_id=1, eos_token_id=2)
_ROPE = {
    "rope_type": "yarn",
    "rope_theta": 1e6,
    "factor": 16.0,
    "original_max_position_embeddings": 16384,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "llama_4_scaling_beta": 0.1,
}


def read_config(fields: Fields) -> ModelConfig:
    """Read a ministral3 config.json."""
    if "rope_parameters" not in fields and "rope_scaling" not in fields:
        fields = fields.updated(Fields({"rope_parameters": _ROPE}, fields.source))
    config = read_decoder(fields, _DEFAULTS)
    return replace(
        config,
        rope=with_query_growth(config.rope, fields),
        windows=uniform_windows(fields, config.num_layers),
    )
