"""Cohere 2 (Command R7B, Command A): parallel parts behind one norm; full layers, one of four, do not rotate."""

from dataclasses import replace

from entrollm.models.config import Block, ModelConfig, Norm
from entrollm.models.config_fields import Fields
from entrollm.models.read import SLIDING, Defaults, patterned_kinds, read_decoder, windows_of

_DEFAULTS = Defaults(
    context_length=8192,
    norm_eps=1e-5,
    tied=True,
    bos_token_id=5,
    eos_token_id=255001,
    keys={"rms_norm_eps": "layer_norm_eps"},
)
_BLOCK = Block(mlp_norm="input_layernorm", is_parallel=True)


def read_config(fields: Fields) -> ModelConfig:
    """Read a cohere2 config.json."""
    config = read_decoder(fields, _DEFAULTS)
    attention_bias = fields.flag("attention_bias", False)
    kinds = patterned_kinds(fields, config.num_layers, fields.integer("sliding_window_pattern", 4))
    return replace(
        config,
        norm=Norm(is_centered=True),
        block=_BLOCK,
        has_rotated_neighbours=True,
        layer_ropes=tuple(config.rope if kind == SLIDING else None for kind in kinds),
        windows=windows_of(fields, kinds, 4096),
        qkv_bias=attention_bias,
        output_bias=attention_bias,
        logit_scale=fields.factor("logit_scale", 0.0625),
    )
