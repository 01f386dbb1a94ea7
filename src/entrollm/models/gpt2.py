"""GPT-2: learned positions, LayerNorm, GELU, and matrices that are stored as (in, out)."""

from dataclasses import replace

from entrollm.models.config import Block, ModelConfig, Names, Norm
from entrollm.models.config_fields import Fields
from entrollm.models.read import Defaults, read_decoder, refuse_flags

_DEFAULTS = Defaults(
    context_length=1024,
    has_own_head_dim=False,
    norm_eps=1e-5,
    tied=True,
    bos_token_id=50256,
    eos_token_id=50256,
    activation="gelu_new",
    keys={
        "hidden_size": "n_embd",
        "intermediate_size": "n_inner",
        "num_hidden_layers": "n_layer",
        "num_attention_heads": "n_head",
        "max_position_embeddings": "n_positions",
        "rms_norm_eps": "layer_norm_epsilon",
        "hidden_act": "activation_function",
    },
    sizes={"vocab_size": 50257, "hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12},
)
_NAMES = Names(
    embedding="transformer.wte.weight",
    positions="transformer.wpe.weight",
    layers="transformer.h.",
    norm="transformer.ln_f",
)
_BLOCK = Block(
    qkv=("attn.c_attn",),
    output="attn.c_proj",
    up=("mlp.c_fc",),
    down="mlp.c_proj",
    attention_norm="ln_1",
    mlp_norm="ln_2",
    is_transposed=True,
)


def read_config(fields: Fields) -> ModelConfig:
    """Read a gpt2 config.json."""
    refuse_flags(fields, "add_cross_attention", "scale_attn_by_inverse_layer_idx")
    if "n_inner" not in fields:
        width = 4 * fields.integer("n_embd", _DEFAULTS.sizes["hidden_size"])
        fields = fields.updated(Fields({"n_inner": width}, fields.source))
    config = read_decoder(fields, _DEFAULTS)
    return replace(
        config,
        names=_NAMES,
        norm=Norm(is_centered=True, has_bias=True),
        block=_BLOCK,
        num_kv_heads=config.num_heads,
        layer_ropes=(None,) * config.num_layers,
        attention_scale=None if fields.flag("scale_attn_weights", True) else 1.0,
        is_gated=False,
        qkv_bias=True,
        output_bias=True,
        mlp_bias=True,
    )
