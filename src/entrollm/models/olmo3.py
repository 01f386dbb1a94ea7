"""OLMo 3: OLMo 2 with windows in three of four layers, whose rotation is not stretched."""

from dataclasses import replace

from entrollm.models.config import ModelConfig
from entrollm.models.config_fields import Fields
from entrollm.models.olmo2 import BLOCK
from entrollm.models.read import (
    FULL,
    SLIDING,
    Defaults,
    patterned_kinds,
    read_decoder,
    windows_of,
    with_ropes_by_kind,
)

_DEFAULTS = Defaults(context_length=2048, norm_eps=1e-5, eos_token_id=50279, theta=500000.0)
# As in transformers, rope_theta outside of the sections is that of full layers.
_THETAS = {FULL: ("rope_theta", 500000.0), SLIDING: (None, 500000.0)}


def read_config(fields: Fields) -> ModelConfig:
    """Read an olmo3 config.json."""
    config = read_decoder(fields, _DEFAULTS)
    attention_bias = fields.flag("attention_bias", False)
    kinds = patterned_kinds(fields, config.num_layers, 4)
    return replace(
        with_ropes_by_kind(config, fields, _DEFAULTS, _THETAS, kinds),
        block=BLOCK,
        qk_norm="width",
        windows=windows_of(fields, kinds, 4096),
        qkv_bias=attention_bias,
        output_bias=attention_bias,
    )
