"""What the config.json files of models with experts have in common."""

from __future__ import annotations

from entrollm.errors import FormatError
from entrollm.models.config import Experts, Mlp
from entrollm.models.config_fields import Fields

_MAX_EXPERTS = 2**16


def named_mlp(prefix: str, size: int) -> Mlp:
    """A gated part with the usual names."""
    return Mlp(up=(f"{prefix}.gate_proj", f"{prefix}.up_proj"), down=f"{prefix}.down_proj", size=size)


def read_counts(fields: Fields, default_count: int, default_used: int) -> tuple[int, int]:
    """How many experts there are, and how many a token runs through.

    Raises:
        FormatError: a value is malformed, or a token runs through more than there are.
    """
    # Both names are in use for the same models.
    key = "num_experts" if "num_experts" in fields else "num_local_experts"
    count = fields.integer(key, default_count, high=_MAX_EXPERTS)
    used = fields.integer("num_experts_per_tok", default_used, high=_MAX_EXPERTS)
    if used > count:
        raise FormatError(f"{fields.source}: num_experts_per_tok {used} is more than {key} {count}")
    return count, used


def sparse_layers(fields: Fields, num_layers: int, experts: Experts) -> tuple[Experts | None, ...]:
    """The experts of each layer by decoder_sparse_step and mlp_only_layers."""
    step = fields.integer("decoder_sparse_step", 1)
    dense = fields.indices("mlp_only_layers", num_layers)
    return tuple(experts if index not in dense and (index + 1) % step == 0 else None for index in range(num_layers))
