"""Granite 3 with experts and a part that all tokens run through."""

from dataclasses import replace

from entrollm.models import granitemoe
from entrollm.models.config import Experts, Mlp, ModelConfig
from entrollm.models.config_fields import Fields


def read_config(fields: Fields) -> ModelConfig:
    """Read a granitemoeshared config.json."""
    config = granitemoe.read_config(fields)
    return replace(config, experts=tuple(with_shared(fields, experts) for experts in config.experts))


def with_shared(fields: Fields, experts: Experts | None) -> Experts | None:
    """The experts of a layer with the part that all tokens run through, if the model has one."""
    size = fields.integer("shared_intermediate_size", 0, low=0)
    if experts is None or size == 0:
        return experts
    return replace(experts, shared=Mlp(up=("shared_mlp.input_linear",), down="shared_mlp.output_linear", size=size))
