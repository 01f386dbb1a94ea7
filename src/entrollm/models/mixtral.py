"""Mixtral: Mistral with experts."""

from dataclasses import replace

from entrollm.models.config import Experts, Mlp, ModelConfig
from entrollm.models.config_fields import Fields
from entrollm.models.experts import read_counts
from entrollm.models.read import Defaults, read_decoder, uniform_windows

_DEFAULTS = Defaults(context_length=131072, kv_heads=8, norm_eps=1e-5, theta=1e6, bos_token_id=1, eos_token_id=2)
_PLACE = "block_sparse_moe"


def read_config(fields: Fields, defaults: Defaults = _DEFAULTS, count: int = 8) -> ModelConfig:
    """Read a mixtral config.json, or one of an architecture with other defaults."""
    config = read_decoder(fields, defaults)
    count, used = read_counts(fields, count, 2)
    experts = Experts(
        count=count,
        used=used,
        router=f"{_PLACE}.gate",
        expert=Mlp(
            up=(f"{_PLACE}.experts.{{}}.w1", f"{_PLACE}.experts.{{}}.w3"),
            down=f"{_PLACE}.experts.{{}}.w2",
            size=config.intermediate_size,
        ),
        normalises=True,
    )
    return replace(
        config,
        windows=uniform_windows(fields, config.num_layers),
        experts=(experts,) * config.num_layers,
    )
