"""Phi 1, 1.5 and 2: parallel parts behind one LayerNorm, biases everywhere, GELU without a gate."""

from dataclasses import replace

from entrollm.models.config import Block, ModelConfig, Names, Norm
from entrollm.models.config_fields import Fields
from entrollm.models.read import Defaults, read_decoder, refuse_flags

_DEFAULTS = Defaults(
    context_length=2048,
    norm_eps=1e-5,
    bos_token_id=1,
    eos_token_id=2,
    activation="gelu_new",
    partial_rotary=0.5,
    keys={"rms_norm_eps": "layer_norm_eps"},
)
_BLOCK = Block(output="self_attn.dense", up=("mlp.fc1",), down="mlp.fc2", mlp_norm="input_layernorm", is_parallel=True)


def read_config(fields: Fields) -> ModelConfig:
    """Read a phi config.json."""
    refuse_flags(fields, "qk_layernorm")
    return replace(
        read_decoder(fields, _DEFAULTS),
        names=Names(norm="model.final_layernorm"),
        norm=Norm(is_centered=True, has_bias=True),
        block=_BLOCK,
        is_gated=False,
        qkv_bias=True,
        output_bias=True,
        mlp_bias=True,
        head_bias=True,
    )
