"""OLMo 2: norms of the outputs alone, and of queries and keys over their whole width."""

from dataclasses import replace

from entrollm.models.config import Block, ModelConfig
from entrollm.models.config_fields import Fields
from entrollm.models.read import Defaults, read_decoder

BLOCK = Block(
    attention_norm=None,
    attention_output_norm="post_attention_layernorm",
    mlp_norm=None,
    mlp_output_norm="post_feedforward_layernorm",
)
_DEFAULTS = Defaults(context_length=2048, norm_eps=1e-5, eos_token_id=50279)


def read_config(fields: Fields) -> ModelConfig:
    """Read an olmo2 config.json."""
    attention_bias = fields.flag("attention_bias", False)
    return replace(
        read_decoder(fields, _DEFAULTS),
        block=BLOCK,
        qk_norm="width",
        qkv_bias=attention_bias,
        output_bias=attention_bias,
    )
