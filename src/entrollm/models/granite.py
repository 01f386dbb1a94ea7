"""Granite 3: Llama with factors on embeddings, scores, residuals and logits."""

from dataclasses import replace

from entrollm.models.config import ModelConfig
from entrollm.models.config_fields import Fields
from entrollm.models.read import Defaults, read_decoder

_DEFAULTS = Defaults(context_length=2048, bos_token_id=1, eos_token_id=2)


def read_config(fields: Fields) -> ModelConfig:
    """Read a granite config.json."""
    attention_bias = fields.flag("attention_bias", False)
    return replace(
        read_decoder(fields, _DEFAULTS),
        qkv_bias=attention_bias,
        output_bias=attention_bias,
        mlp_bias=fields.flag("mlp_bias", False),
        embedding_scale=fields.factor("embedding_multiplier", 1.0),
        attention_scale=fields.factor("attention_multiplier", 1.0),
        residual_scale=fields.factor("residual_multiplier", 1.0),
        logit_scale=1 / fields.factor("logits_scaling", 1.0),
    )
