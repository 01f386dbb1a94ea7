"""What the config.json files of models with latent attention have in common."""

from __future__ import annotations

from dataclasses import replace

from entrollm.models.config import LatentAttention, ModelConfig
from entrollm.models.config_fields import MAX_FACTOR, Fields
from entrollm.models.read import Defaults, read_decoder
from entrollm.models.rope import yarn_magnitude


def read_latent_decoder(
    fields: Fields, defaults: Defaults, *, ranks: tuple[int, int], plain: int, rotated: int, value: int
) -> ModelConfig:
    """Read a decoder with latent attention in all layers.

    Args:
        fields: of config.json.
        defaults: of the architecture.
        ranks: kv_lora_rank and q_lora_rank by default.
        plain, rotated, value: features of a head by default: qk_nope_head_dim, qk_rope_head_dim, v_head_dim.
    Raises:
        FormatError, UnsupportedError: as for `read_decoder`.
    """
    plain, rotated = fields.integer("qk_nope_head_dim", plain), fields.integer("qk_rope_head_dim", rotated)
    # The rotated features are a head for what concerns their angles, whatever head_dim says.
    config = read_decoder(fields.updated(Fields({"head_dim": rotated}, fields.source)), defaults)
    mixer = LatentAttention(
        rank=fields.integer("kv_lora_rank", ranks[0]),
        query_rank=fields.optional_integer("q_lora_rank", ranks[1]),
        plain=plain,
        rotated=rotated,
        value=fields.integer("v_head_dim", value),
        scale=(plain + rotated) ** -0.5 * _magnitude(fields) ** 2,
        has_bias=fields.flag("attention_bias", False),
    )
    return replace(
        config,
        has_rotated_neighbours=fields.flag("rope_interleave", True),
        mixers=(mixer,) * config.num_layers,
    )


def _magnitude(fields: Fields) -> float:
    """How much yarn makes scores larger, as mscale_all_dim says."""
    section = fields.section("rope_scaling" if fields.raw("rope_scaling") else "rope_parameters")
    weight = section.number("mscale_all_dim", 0.0, high=MAX_FACTOR)
    if section.text("rope_type", section.text("type", "default")) == "default" or not weight:
        return 1.0
    return yarn_magnitude(weight, section.factor("factor"))
