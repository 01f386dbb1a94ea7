"""GLM-4 (0414): norms of the inputs and the outputs, half of each head rotated in neighbouring pairs."""

from dataclasses import replace

from entrollm.models.config import Block, ModelConfig
from entrollm.models.config_fields import Fields
from entrollm.models.read import Defaults, read_decoder

_DEFAULTS = Defaults(
    context_length=131072,
    head_dim=128,
    kv_heads=2,
    norm_eps=1.5625e-7,
    partial_rotary=0.5,
)
_ENDS = (151329, 151336, 151338)
_BLOCK = Block(
    up=("mlp.gate_up_proj",),
    attention_output_norm="post_self_attn_layernorm",
    mlp_output_norm="post_mlp_layernorm",
)


def read_config(fields: Fields) -> ModelConfig:
    """Read a glm4 config.json."""
    config = read_decoder(fields, _DEFAULTS)
    return replace(
        config,
        block=_BLOCK,
        has_rotated_neighbours=True,
        qkv_bias=fields.flag("attention_bias", True),
        eos_token_ids=config.eos_token_ids or _ENDS,
    )
