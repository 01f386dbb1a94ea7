"""Gemma 2: Gemma with norms of the outputs too, capped scores and logits, and a window in every other layer."""

from dataclasses import replace

from entrollm.models.config import Block, ModelConfig
from entrollm.models.config_fields import Fields
from entrollm.models.gemma import NORM
from entrollm.models.read import Defaults, patterned_kinds, read_cap, read_decoder, refuse_flags, windows_of

BLOCK = Block(
    attention_output_norm="post_attention_layernorm",
    mlp_norm="pre_feedforward_layernorm",
    mlp_output_norm="post_feedforward_layernorm",
)
DEFAULTS = Defaults(
    context_length=8192,
    head_dim=256,
    kv_heads=4,
    tied=True,
    bos_token_id=2,
    eos_token_id=1,
    activation="gelu_pytorch_tanh",
    keys={"hidden_act": "hidden_activation"},
)


def read_config(fields: Fields) -> ModelConfig:
    """Read a gemma2 config.json."""
    refuse_flags(fields, "use_bidirectional_attention")
    config = read_decoder(fields, DEFAULTS)
    attention_bias = fields.flag("attention_bias", False)
    return replace(
        config,
        norm=NORM,
        block=BLOCK,
        embedding_scale=config.hidden_size**0.5,
        attention_scale=fields.factor("query_pre_attn_scalar", 256.0) ** -0.5,
        attention_cap=read_cap(fields, "attn_logit_softcapping", 50.0),
        logit_cap=read_cap(fields, "final_logit_softcapping", 30.0),
        windows=windows_of(fields, patterned_kinds(fields, config.num_layers, 2), 4096),
        qkv_bias=attention_bias,
        output_bias=attention_bias,
    )
