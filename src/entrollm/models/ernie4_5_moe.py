"""ERNIE 4.5 with experts, chosen by corrected shares."""

from dataclasses import replace

from entrollm.errors import FormatError
from entrollm.models import ernie4_5
from entrollm.models.config import Experts, ModelConfig, Routing
from entrollm.models.config_fields import Fields
from entrollm.models.experts import named_mlp
from entrollm.models.read import Defaults

_DEFAULTS = Defaults(
    context_length=131072,
    kv_heads=4,
    norm_eps=1e-5,
    theta=500000.0,
    tied=True,
    bos_token_id=1,
    eos_token_id=2,
)


def read_config(fields: Fields) -> ModelConfig:
    """Read an ernie4_5_moe config.json."""
    config = ernie4_5.read_config(fields, _DEFAULTS)
    count, used = fields.integer("moe_num_experts", 64), fields.integer("moe_k", 6)
    if used > count:
        raise FormatError(f"{fields.source}: moe_k {used} is more than moe_num_experts {count}")
    size, shared = fields.integer("moe_intermediate_size", 1536), fields.integer("moe_num_shared_experts", 2, low=0)
    experts = Experts(
        count=count,
        used=used,
        router="mlp.gate",
        expert=named_mlp("mlp.experts.{}", size),
        normalises=True,
        routing=Routing(
            correction="mlp.moe_statics.e_score_correction_bias",
            is_correction_matrix=True,
            least_sum=fields.number("moe_norm_min", 1e-12),
        ),
        shared=replace(named_mlp("mlp.shared_experts", size * shared), has_bias=config.mlp_bias) if shared else None,
    )
    return replace(config, head_bias=config.mlp_bias, experts=_placed(fields, config.num_layers, experts))


def _placed(fields: Fields, num_layers: int, experts: Experts) -> tuple[Experts | None, ...]:
    """The experts of each layer, by the first and last layer that has them and the distance between such layers."""
    first = fields.integer("moe_layer_start_index", 1, low=0)
    last = fields.integer("moe_layer_end_index", -1, low=-1)
    step = fields.integer("moe_layer_interval", 1)
    last = num_layers - 1 if last == -1 else last
    return tuple(experts if first <= i <= last and (i + 1) % step == 0 else None for i in range(num_layers))
