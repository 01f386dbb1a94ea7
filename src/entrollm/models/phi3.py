"""Phi-3, Phi-3.5 and Phi-4 (mini): fused projections, longrope and partial rotation."""

from dataclasses import replace

from entrollm.models.config import Block, ModelConfig
from entrollm.models.config_fields import Fields
from entrollm.models.read import Defaults, read_decoder, uniform_windows

_DEFAULTS = Defaults(
    context_length=4096,
    original_context_length=4096,
    norm_eps=1e-5,
    bos_token_id=1,
    eos_token_id=32000,
    partial_rotary=1.0,
    # Older checkpoints call longrope "su" or "yarn".
    rope_aliases={"su": "longrope", "yarn": "longrope"},
)
_BLOCK = Block(qkv=("self_attn.qkv_proj",), up=("mlp.gate_up_proj",))


def read_config(fields: Fields) -> ModelConfig:
    """Read a phi3 config.json."""
    config = read_decoder(fields, _DEFAULTS)
    return replace(config, block=_BLOCK, windows=uniform_windows(fields, config.num_layers))
