"""Granite 3 with experts."""

from dataclasses import replace

from entrollm.models import granite
from entrollm.models.config import Experts, Mlp, ModelConfig
from entrollm.models.config_fields import Fields
from entrollm.models.experts import read_counts

_PLACE = "block_sparse_moe"


def read_config(fields: Fields) -> ModelConfig:
    """Read a granitemoe config.json."""
    config = granite.read_config(fields)
    # Biases are those of attention alone.
    return replace(config, mlp_bias=False, experts=(read_experts(fields, config),) * config.num_layers)


def read_experts(fields: Fields, config: ModelConfig) -> Experts:
    """The experts of a Granite model, all in one tensor."""
    count, used = read_counts(fields, 8, 2)
    return Experts(
        count=count,
        used=used,
        router=f"{_PLACE}.router.layer",
        expert=Mlp(
            up=(f"{_PLACE}.input_linear.weight.{{}}",),
            down=f"{_PLACE}.output_linear.weight.{{}}",
            size=config.intermediate_size,
            suffix="",
        ),
        normalises=True,
    )
