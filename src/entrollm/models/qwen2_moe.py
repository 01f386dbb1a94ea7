"""Qwen 1.5 and Qwen2 with experts, and a part that all tokens run through."""

from dataclasses import replace

from entrollm.models.config import Experts, ModelConfig
from entrollm.models.config_fields import Fields
from entrollm.models.experts import named_mlp, read_counts, sparse_layers
from entrollm.models.read import Defaults, layered_windows, read_decoder

_DEFAULTS = Defaults(context_length=32768, kv_heads=16)


def read_config(fields: Fields) -> ModelConfig:
    """Read a qwen2_moe config.json."""
    config = read_decoder(fields, _DEFAULTS)
    count, used = read_counts(fields, 60, 4)
    experts = Experts(
        count=count,
        used=used,
        router="mlp.gate",
        expert=named_mlp("mlp.experts.{}", fields.integer("moe_intermediate_size", 1408)),
        normalises=fields.flag("norm_topk_prob", False),
        shared=named_mlp("mlp.shared_expert", fields.integer("shared_expert_intermediate_size", 5632)),
        shared_gate="mlp.shared_expert_gate",
    )
    return replace(
        config,
        qkv_bias=fields.flag("qkv_bias", True),
        windows=layered_windows(fields, config.num_layers, lambda index, last: index < last and index % 2 == 0),
        experts=sparse_layers(fields, config.num_layers, experts),
    )
