"""Mistral 4 (text): latent attention with queries that grow with their position, and experts."""

from dataclasses import replace

from entrollm.models.config import ModelConfig
from entrollm.models.config_fields import Fields
from entrollm.models.experts import read_corrected_experts
from entrollm.models.latent import read_latent_decoder
from entrollm.models.read import Defaults
from entrollm.models.rope import with_query_growth

_DEFAULTS = Defaults(context_length=1048576, bos_token_id=1, eos_token_id=2)
_ROPE = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 128.0,
    "original_max_position_embeddings": 8192,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "llama_4_scaling_beta": 0.1,
}


def read_config(fields: Fields) -> ModelConfig:
    """Read a mistral4 config.json."""
    key = "rope_scaling" if fields.raw("rope_scaling") else "rope_parameters"
    section = fields.section(key) if key in fields else Fields(_ROPE, fields.source)
    # The rotated features are a head of their own, all of which is rotated.
    rope = {name: section.raw(name) for name in section.keys() if name != "partial_rotary_factor"}  # noqa: SIM118
    fields = fields.updated(Fields({key: rope}, fields.source))
    config = read_latent_decoder(fields, _DEFAULTS, ranks=(256, 1024), plain=64, rotated=64, value=128)
    experts = read_corrected_experts(fields, count=128, used=4, size=2048, scale=1.0)
    experts = replace(experts, routing=replace(experts.routing, scores="softmax", correction=""))
    dense = fields.integer("first_k_dense_replace", 0, low=0)
    return replace(
        config,
        rope=with_query_growth(config.rope, fields),
        experts=tuple(None if i < dense else experts for i in range(config.num_layers)),
    )
