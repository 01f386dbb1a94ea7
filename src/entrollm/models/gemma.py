"""Gemma 1: scaled embeddings, norms whose weights are stored less one, and GELU."""

from dataclasses import replace

from entrollm.models.config import ModelConfig, Norm
from entrollm.models.config_fields import Fields
from entrollm.models.read import Defaults, read_decoder, refuse_flags

NORM = Norm(weight_offset=1.0)
_DEFAULTS = Defaults(
    context_length=8192,
    head_dim=256,
    kv_heads=16,
    tied=True,
    bos_token_id=2,
    eos_token_id=1,
    activation="gelu_pytorch_tanh",
)


def read_config(fields: Fields) -> ModelConfig:
    """Read a gemma config.json."""
    refuse_flags(fields, "use_bidirectional_attention")
    config = read_decoder(fields, _DEFAULTS)
    attention_bias = fields.flag("attention_bias", False)
    return replace(
        config,
        norm=NORM,
        embedding_scale=config.hidden_size**0.5,
        # The first checkpoints say gelu, and mean its approximation.
        activation="gelu_tanh" if config.activation == "gelu" else config.activation,
        qkv_bias=attention_bias,
        output_bias=attention_bias,
    )
