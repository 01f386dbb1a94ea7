"""DeepSeek V2: latent attention, and experts chosen by their shares, within groups or not."""

from dataclasses import replace

from entrollm.errors import FormatError, UnsupportedError
from entrollm.models.config import Experts, ModelConfig, Routing
from entrollm.models.config_fields import Fields
from entrollm.models.experts import named_mlp, read_groups
from entrollm.models.latent import read_latent_decoder
from entrollm.models.read import Defaults, refuse_flags

_DEFAULTS = Defaults(context_length=2048, bos_token_id=1, eos_token_id=2)
_METHODS = ("greedy", "group_limited_greedy")


def read_config(fields: Fields) -> ModelConfig:
    """Read a deepseek_v2 config.json."""
    refuse_flags(fields, "norm_topk_prob", "mlp_bias")
    config = read_latent_decoder(fields, _DEFAULTS, ranks=(512, 1536), plain=128, rotated=64, value=128)
    dense = fields.integer("first_k_dense_replace", 0, low=0)
    experts = _read_experts(fields)
    return replace(
        config,
        # Features are always rotated so.
        has_rotated_neighbours=True,
        experts=tuple(None if i < dense else experts for i in range(config.num_layers)),
    )


def _read_experts(fields: Fields) -> Experts:
    count, used = fields.integer("n_routed_experts", 64), fields.integer("num_experts_per_tok")
    if used > count:
        raise FormatError(f"{fields.source}: num_experts_per_tok {used} is more than n_routed_experts {count}")
    method = fields.text("topk_method", _METHODS[0])
    if method not in _METHODS:
        raise UnsupportedError(f"{fields.source}: topk_method {method!r:.40} is not supported; supported: {_METHODS}")
    groups, used_groups = (1, 1) if method == _METHODS[0] else read_groups(fields, count, used)
    size, shared = fields.integer("moe_intermediate_size", 1407), fields.integer("n_shared_experts", 2, low=0)
    return Experts(
        count=count,
        used=used,
        router="mlp.gate",
        expert=named_mlp("mlp.experts.{}", size),
        normalises=False,
        routing=Routing(groups=groups, used_groups=used_groups, scale=fields.factor("routed_scaling_factor", 1.0)),
        shared=named_mlp("mlp.shared_experts", size * shared) if shared else None,
    )
