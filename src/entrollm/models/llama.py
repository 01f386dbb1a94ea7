"""Llama 1 to 3 and the models that share its architecture, such as SmolLM and TinyLlama."""

from dataclasses import replace

from entrollm.models.config import ModelConfig
from entrollm.models.config_fields import Fields
from entrollm.models.read import Defaults, read_decoder

_DEFAULTS = Defaults(context_length=2048, bos_token_id=1, eos_token_id=2)


def read_config(fields: Fields) -> ModelConfig:
    """Read a llama config.json."""
    attention_bias = fields.flag("attention_bias", False)
    return replace(
        read_decoder(fields, _DEFAULTS),
        qkv_bias=attention_bias,
        output_bias=attention_bias,
        mlp_bias=fields.flag("mlp_bias", False),
    )
