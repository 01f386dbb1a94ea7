"""Phi-3.5-MoE: Mixtral with centered norms, SparseMixer's routing, and factors of its own on longrope's angles."""

from dataclasses import replace

from entrollm.errors import FormatError, UnsupportedError
from entrollm.models import mixtral
from entrollm.models.config import ModelConfig, Norm, Routing
from entrollm.models.config_fields import Fields
from entrollm.models.read import Defaults
from entrollm.models.rope import Rope

_DEFAULTS = Defaults(context_length=131072, kv_heads=8, norm_eps=1e-5, theta=1e6, bos_token_id=1, eos_token_id=2)
_CHOSEN = 2


def read_config(fields: Fields) -> ModelConfig:
    """Read a phimoe config.json."""
    config = mixtral.read_config(fields, _DEFAULTS, count=16)
    routing = Routing(scores="sparse_mixer", jitter=fields.number("router_jitter_noise", 0.01))
    for experts in config.experts:
        if experts is not None and not experts.used == _CHOSEN <= experts.count:
            raise FormatError(f"{fields.source}: num_experts_per_tok {experts.used} should be {_CHOSEN}")
    attention_bias = fields.flag("attention_bias", False)
    return replace(
        config,
        rope=_scaled(fields, config.rope),
        norm=Norm(is_centered=True, has_bias=True),
        qkv_bias=attention_bias,
        output_bias=attention_bias,
        head_bias=fields.flag("lm_head_bias", False),
        experts=tuple(None if experts is None else replace(experts, routing=routing) for experts in config.experts),
    )


def _scaled(fields: Fields, rope: Rope) -> Rope:
    """The rotary embedding with the factors that its section states."""
    section = fields.section("rope_scaling" if fields.raw("rope_scaling") else "rope_parameters")
    kind = section.text("rope_type", section.text("type", "default"))
    if kind == "default":
        return rope
    if rope.long_frequencies is None:
        raise UnsupportedError(f"{section.source}: rope type {kind!r:.40} is not supported for this model type")
    return replace(rope, scale=section.factor("short_mscale"), long_scale=section.factor("long_mscale"))
