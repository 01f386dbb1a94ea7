"""Qwen3 with experts."""

from dataclasses import replace

from entrollm.models.config import Experts, ModelConfig
from entrollm.models.config_fields import Fields
from entrollm.models.experts import named_mlp, read_counts, sparse_layers
from entrollm.models.read import Defaults, read_decoder, uniform_windows

_DEFAULTS = Defaults(context_length=32768, kv_heads=4)


def read_config(fields: Fields) -> ModelConfig:
    """Read a qwen3_moe config.json."""
    config = read_decoder(fields, _DEFAULTS)
    count, used = read_counts(fields, 128, 8)
    experts = Experts(
        count=count,
        used=used,
        router="mlp.gate",
        expert=named_mlp("mlp.experts.{}", fields.integer("moe_intermediate_size", 768)),
        normalises=fields.flag("norm_topk_prob", False),
    )
    attention_bias = fields.flag("attention_bias", False)
    slides = fields.flag("use_sliding_window", False)
    return replace(
        config,
        qk_norm="head",
        qkv_bias=attention_bias,
        output_bias=attention_bias,
        windows=uniform_windows(fields, config.num_layers, 4096) if slides else config.windows,
        experts=sparse_layers(fields, config.num_layers, experts),
    )
