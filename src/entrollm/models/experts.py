"""What the config.json files of models with experts have in common."""

from __future__ import annotations

from entrollm.errors import FormatError
from entrollm.models.config import Experts, Mlp, Routing
from entrollm.models.config_fields import Fields

_MAX_EXPERTS = 2**16


def named_mlp(prefix: str, size: int) -> Mlp:
    """A gated part with the usual names."""
    return Mlp(up=(f"{prefix}.gate_proj", f"{prefix}.up_proj"), down=f"{prefix}.down_proj", size=size)


def stacked_mlp(prefix: str, size: int) -> Mlp:
    """A gated part of experts that lie in tensors of three axes with the usual names."""
    return Mlp(up=(f"{prefix}.gate_up_proj.{{}}",), down=f"{prefix}.down_proj.{{}}", size=size, suffix="")


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


def read_corrected_experts(
    fields: Fields, *, count: int, used: int, size: int, scale: float, groups: tuple[int, int] = (1, 1)
) -> Experts:
    """Experts chosen by sigmoids plus a correction, within groups, as DeepSeek V3 has them.

    Args:
        fields: of config.json.
        count, used, size, scale, groups: what it means by default: experts, those of a token, their features, the
            factor on their weights, and the groups of all and of a token.
    Raises:
        FormatError: a value is malformed, or the groups do not share the experts.
    """
    count, used = fields.integer("n_routed_experts", count), fields.integer("num_experts_per_tok", used)
    all_groups, used_groups = read_groups(fields, count, used, groups)
    size = fields.integer("moe_intermediate_size", size)
    shared = fields.integer("n_shared_experts", 1, low=0)
    return Experts(
        count=count,
        used=used,
        router="mlp.gate",
        expert=named_mlp("mlp.experts.{}", size),
        stack=stacked_mlp("mlp.experts", size),
        # Null is false, as in transformers.
        normalises=fields.flag("norm_topk_prob", not fields.has("norm_topk_prob")),
        routing=Routing(
            scores="sigmoid",
            correction="mlp.gate.e_score_correction_bias",
            groups=all_groups,
            used_groups=used_groups,
            best=2,
            scale=fields.factor("routed_scaling_factor", scale),
        ),
        shared=named_mlp("mlp.shared_experts", size * shared) if shared else None,
    )


def read_groups(fields: Fields, count: int, used: int, default: tuple[int, int] = (1, 1)) -> tuple[int, int]:
    """Into how many groups the experts are divided, and in how many of them a token finds its own.

    Raises:
        FormatError: the groups do not share the experts evenly, or have too few for a token.
    """
    groups, used_groups = fields.integer("n_group", default[0]), fields.integer("topk_group", default[1])
    if count % groups or used_groups > groups or used > count // groups * used_groups:
        raise FormatError(
            f"{fields.source}: {used} of {count} experts cannot come from {used_groups} (topk_group) of {groups} "
            "(n_group) equal groups"
        )
    return groups, used_groups


def sparse_layers(fields: Fields, num_layers: int, experts: Experts) -> tuple[Experts | None, ...]:
    """The experts of each layer by decoder_sparse_step and mlp_only_layers."""
    step = fields.integer("decoder_sparse_step", 1)
    dense = fields.indices("mlp_only_layers", num_layers)
    return tuple(experts if index not in dense and (index + 1) % step == 0 else None for index in range(num_layers))
