"""GPT-NeoX (Pythia): LayerNorm, parallel parts, a fused projection ordered by head, GELU without a gate."""

from dataclasses import replace

from entrollm.models.config import Block, ModelConfig, Names, Norm
from entrollm.models.config_fields import Fields
from entrollm.models.read import Defaults, read_decoder

_DEFAULTS = Defaults(
    context_length=2048,
    has_own_head_dim=False,
    norm_eps=1e-5,
    bos_token_id=0,
    eos_token_id=2,
    activation="gelu",
    partial_rotary=0.25,
    keys={
        "rms_norm_eps": "layer_norm_eps",
        "rope_theta": "rotary_emb_base",
        "partial_rotary_factor": "rotary_pct",
    },
)
_NAMES = Names(
    embedding="gpt_neox.embed_in.weight",
    layers="gpt_neox.layers.",
    norm="gpt_neox.final_layer_norm",
    head="embed_out.weight",
)


def read_config(fields: Fields) -> ModelConfig:
    """Read a gpt_neox config.json."""
    config = read_decoder(fields, _DEFAULTS)
    attention_bias = fields.flag("attention_bias", True)
    return replace(
        config,
        names=_NAMES,
        norm=Norm(is_centered=True, has_bias=True),
        block=Block(
            qkv=("attention.query_key_value",),
            output="attention.dense",
            up=("mlp.dense_h_to_4h",),
            down="mlp.dense_4h_to_h",
            is_parallel=fields.flag("use_parallel_residual", True),
        ),
        num_kv_heads=config.num_heads,
        is_qkv_by_head=True,
        is_gated=False,
        qkv_bias=attention_bias,
        output_bias=attention_bias,
        mlp_bias=True,
    )
