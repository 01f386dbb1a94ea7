"""SmolLM3: Llama with layers that do not rotate."""

from dataclasses import replace

from entrollm.models.config import ModelConfig
from entrollm.models.config_fields import Fields
from entrollm.models.read import SLIDING, Defaults, layer_kinds, read_decoder

_DEFAULTS = Defaults(context_length=32768, kv_heads=4, theta=2e6, tied=True, bos_token_id=128000, eos_token_id=128001)


def read_config(fields: Fields) -> ModelConfig:
    """Read a smollm3 config.json."""
    config = read_decoder(fields, _DEFAULTS)
    interval = fields.integer("no_rope_layer_interval", 4)
    rotates = [(index + 1) % interval != 0 for index in range(config.num_layers)]
    if "no_rope_layers" in fields:
        # The list says 1 where a layer rotates.
        rotates = [value == 1 for value in fields.integers("no_rope_layers", config.num_layers, high=1)]
    window = fields.optional_integer("sliding_window", high=2**31) if fields.flag("use_sliding_window", False) else None
    kinds = layer_kinds(fields, config.num_layers)
    slides = [kind == SLIDING for kind in kinds] if kinds else [not rotate for rotate in rotates]
    attention_bias = fields.flag("attention_bias", False)
    return replace(
        config,
        layer_ropes=tuple(config.rope if rotate else None for rotate in rotates),
        windows=tuple(window if slide else None for slide in slides),
        qkv_bias=attention_bias,
        output_bias=attention_bias,
        mlp_bias=fields.flag("mlp_bias", False),
    )
