"""Granite 4 without state-space layers and experts, as its small dense models are."""

from dataclasses import replace

from entrollm.errors import UnsupportedError
from entrollm.models import granite
from entrollm.models.config import Block, ModelConfig
from entrollm.models.config_fields import Fields

_BLOCK = Block(up=("shared_mlp.input_linear",), down="shared_mlp.output_linear")
_ATTENTION = ("attention", "full_attention")


def read_config(fields: Fields) -> ModelConfig:
    """Read a granitemoehybrid config.json."""
    config = granite.read_config(fields)
    if fields.integer("num_local_experts", 8, low=0):
        raise UnsupportedError(f"{fields.source}: num_local_experts other than 0 is not supported for this model type")
    kinds = fields.texts("layer_types", config.num_layers) if "layer_types" in fields else ["mamba"]
    for kind in kinds:
        if kind not in _ATTENTION:
            raise UnsupportedError(f"{fields.source}: layer type {kind!r} is not supported; supported: attention")
    rotates = fields.text("position_embedding_type", "nope") == "rope"
    return replace(
        config,
        block=_BLOCK,
        layer_ropes=() if rotates else (None,) * config.num_layers,
        intermediate_size=fields.integer("shared_intermediate_size", 1024),
    )
