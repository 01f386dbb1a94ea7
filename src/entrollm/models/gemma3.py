"""Gemma 3 (text): Gemma 2 with normalised queries and keys in place of caps; layers with windows rotate otherwise."""

from dataclasses import replace

from entrollm.models.config import ModelConfig
from entrollm.models.config_fields import Fields
from entrollm.models.gemma import NORM
from entrollm.models.gemma2 import BLOCK, DEFAULTS
from entrollm.models.read import (
    FULL,
    SLIDING,
    patterned_kinds,
    read_cap,
    read_decoder,
    refuse_flags,
    windows_of,
    with_ropes_by_kind,
)

_DEFAULTS = replace(
    DEFAULTS,
    context_length=131072,
    sizes={
        "vocab_size": 262208,
        "hidden_size": 2304,
        "intermediate_size": 9216,
        "num_hidden_layers": 26,
        "num_attention_heads": 8,
    },
)
_THETAS = {FULL: ("rope_theta", 1e6), SLIDING: ("rope_local_base_freq", 1e4)}


def read_config(fields: Fields) -> ModelConfig:
    """Read a gemma3_text config.json, or the text_config of a gemma3 one."""
    refuse_flags(fields, "use_bidirectional_attention")
    config = read_decoder(fields, _DEFAULTS)
    attention_bias = fields.flag("attention_bias", False)
    kinds = patterned_kinds(fields, config.num_layers, fields.integer("sliding_window_pattern", 6))
    return replace(
        with_ropes_by_kind(config, fields, _DEFAULTS, _THETAS, kinds),
        norm=NORM,
        block=BLOCK,
        qk_norm="head",
        windows=windows_of(fields, kinds, 4096),
        embedding_scale=config.hidden_size**0.5,
        attention_scale=fields.factor("query_pre_attn_scalar", 256.0) ** -0.5,
        attention_cap=read_cap(fields, "attn_logit_softcapping"),
        logit_cap=read_cap(fields, "final_logit_softcapping"),
        qkv_bias=attention_bias,
        output_bias=attention_bias,
    )
