"""EXAONE 4: norms of the outputs alone, normalised queries and keys; with windows, the full layers do not rotate."""

from dataclasses import replace

from entrollm.models.config import ModelConfig
from entrollm.models.config_fields import Fields
from entrollm.models.olmo2 import BLOCK
from entrollm.models.read import FULL, SLIDING, Defaults, layer_kinds, read_decoder, windows_of

_DEFAULTS = Defaults(context_length=2048, kv_heads=32, norm_eps=1e-5, bos_token_id=0, eos_token_id=2)


def read_config(fields: Fields) -> ModelConfig:
    """Read an exaone4 config.json."""
    config = read_decoder(fields, _DEFAULTS)
    window = fields.optional_integer("sliding_window", 4096, high=2**31)
    kinds = layer_kinds(fields, config.num_layers) or _pattern(fields, config.num_layers, window)
    return replace(
        config,
        block=BLOCK,
        qk_norm="head",
        layer_ropes=tuple(config.rope if window is None or kind == SLIDING else None for kind in kinds),
        windows=windows_of(fields, kinds, 4096),
    )


def _pattern(fields: Fields, num_layers: int, window: int | None) -> list[str]:
    """The kinds of layers by sliding_window_pattern, after as many of which a layer is full."""
    if window is None:
        return [FULL] * num_layers
    period = fields.integer("sliding_window_pattern", 4)
    return [SLIDING if (index + 1) % period else FULL for index in range(num_layers)]
