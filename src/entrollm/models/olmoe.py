"""OLMoE: experts, and norms of queries and keys over their whole width."""

from dataclasses import replace

from entrollm.errors import UnsupportedError
from entrollm.models.config import Experts, ModelConfig
from entrollm.models.config_fields import Fields
from entrollm.models.experts import named_mlp, read_counts
from entrollm.models.read import Defaults, read_decoder

_DEFAULTS = Defaults(context_length=4096, norm_eps=1e-5, eos_token_id=50279)


def read_config(fields: Fields) -> ModelConfig:
    """Read an olmoe config.json."""
    if "clip_qkv" in fields:
        raise UnsupportedError(f"{fields.source}: clip_qkv is not supported")
    config = read_decoder(fields, _DEFAULTS)
    count, used = read_counts(fields, 64, 8)
    experts = Experts(
        count=count,
        used=used,
        router="mlp.gate",
        expert=named_mlp("mlp.experts.{}", config.intermediate_size),
        normalises=fields.flag("norm_topk_prob", False),
    )
    attention_bias = fields.flag("attention_bias", False)
    return replace(
        config,
        qk_norm="width",
        qkv_bias=attention_bias,
        output_bias=attention_bias,
        experts=(experts,) * config.num_layers,
    )
