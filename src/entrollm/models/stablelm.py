"""StableLM: Llama with LayerNorm and a quarter of each head rotated; parts in parallel in some models."""

from dataclasses import replace

from entrollm.models.config import Block, ModelConfig, Norm
from entrollm.models.config_fields import Fields
from entrollm.models.read import Defaults, read_decoder, refuse_flags

_DEFAULTS = Defaults(
    context_length=4096,
    has_own_head_dim=False,
    kv_heads=32,
    norm_eps=1e-5,
    bos_token_id=0,
    eos_token_id=0,
    partial_rotary=0.25,
    keys={"rms_norm_eps": "layer_norm_eps"},
)
_PARALLEL = Block(mlp_norm="input_layernorm", is_parallel=True)


def read_config(fields: Fields) -> ModelConfig:
    """Read a stablelm config.json."""
    refuse_flags(fields, "qk_layernorm")
    return replace(
        read_decoder(fields, _DEFAULTS),
        norm=Norm(is_centered=True, has_bias=True),
        block=_PARALLEL if fields.flag("use_parallel_residual", False) else Block(),
        qkv_bias=fields.flag("use_qkv_bias", False),
    )
