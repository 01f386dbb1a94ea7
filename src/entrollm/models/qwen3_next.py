"""Qwen3-Next: gated delta layers, gated attention, and experts."""

from dataclasses import replace

from entrollm.models.config import Experts, ModelConfig
from entrollm.models.config_fields import Fields
from entrollm.models.experts import named_mlp, read_counts, sparse_layers, stacked_mlp
from entrollm.models.gated_delta import read_delta_decoder
from entrollm.models.read import Defaults

_DEFAULTS = Defaults(context_length=32768, head_dim=256, kv_heads=2, partial_rotary=0.25)


def read_config(fields: Fields) -> ModelConfig:
    """Read a qwen3_next config.json."""
    config = read_delta_decoder(fields, _DEFAULTS, is_by_head=True)
    experts = read_experts(fields, count=512, used=10, normalises=fields.flag("norm_topk_prob", True))
    return replace(config, experts=sparse_layers(fields, config.num_layers, experts))


def read_experts(fields: Fields, *, count: int, used: int, normalises: bool) -> Experts:
    """The experts of Qwen's hybrids, `count` of which a token uses `used` by default."""
    count, used = read_counts(fields, count, used)
    size = fields.integer("moe_intermediate_size", 512)
    return Experts(
        count=count,
        used=used,
        router="mlp.gate",
        expert=named_mlp("mlp.experts.{}", size),
        stack=stacked_mlp("mlp.experts", size),
        normalises=normalises,
        shared=named_mlp("mlp.shared_expert", fields.integer("shared_expert_intermediate_size", 512)),
        shared_gate="mlp.shared_expert_gate",
    )
