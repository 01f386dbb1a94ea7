"""LFM2: gated short convolutions, and attention every few layers."""

from dataclasses import replace

from entrollm.errors import UnsupportedError
from entrollm.models.config import Block, ModelConfig, Names, ShortConvolution
from entrollm.models.config_fields import Fields
from entrollm.models.read import FULL, Defaults, read_decoder

_DEFAULTS = Defaults(
    context_length=128000,
    kv_heads=8,
    norm_eps=1e-5,
    theta=1e6,
    tied=True,
    bos_token_id=1,
    eos_token_id=2,
    keys={"rms_norm_eps": "norm_eps"},
)
_BLOCK = Block(
    output="self_attn.out_proj",
    q_norm="self_attn.q_layernorm",
    k_norm="self_attn.k_layernorm",
    up=("feed_forward.w1", "feed_forward.w3"),
    down="feed_forward.w2",
    attention_norm="operator_norm",
    mlp_norm="ffn_norm",
)
_CONVOLUTION = "conv"
_MAX_KERNEL = 64


def read_config(fields: Fields) -> ModelConfig:
    """Read an lfm2 config.json."""
    # Older names of fields win, as in transformers.
    renamed = {"intermediate_size": fields.raw("block_ff_dim"), "tie_word_embeddings": fields.raw("tie_embedding")}
    fields = fields.updated(Fields(renamed, fields.source))
    config = read_decoder(fields, _DEFAULTS)
    form = ShortConvolution(
        kernel=fields.integer("conv_L_cache", 3, low=2, high=_MAX_KERNEL), has_bias=fields.flag("conv_bias", False)
    )
    return replace(
        config,
        block=_BLOCK,
        names=Names(norm="model.embedding_norm"),
        qk_norm="head",
        activation="silu",
        intermediate_size=_adjusted(fields, config.intermediate_size),
        mixers=tuple(None if kind == FULL else form for kind in _kinds(fields, config.num_layers)),
    )


def _adjusted(fields: Fields, size: int) -> int:
    """The features of the feed-forward part, which config.json may state before it is scaled and rounded up."""
    if not fields.flag("block_auto_adjust_ff_dim", True):
        return size
    size = 2 * size // 3
    if fields.has("block_ffn_dim_multiplier") and "block_ffn_dim_multiplier" not in fields:
        return size
    multiple = fields.integer("block_multiple_of", 256)
    size = int(fields.factor("block_ffn_dim_multiplier", 1.0) * size)
    return -(-size // multiple) * multiple


def _kinds(fields: Fields, num_layers: int) -> list[str]:
    if "layer_types" not in fields:
        full = range(num_layers) if "full_attn_idxs" not in fields else fields.indices("full_attn_idxs", num_layers)
        return [FULL if index in full else _CONVOLUTION for index in range(num_layers)]
    kinds = fields.texts("layer_types", num_layers)
    for kind in kinds:
        if kind not in (_CONVOLUTION, FULL):
            raise UnsupportedError(
                f"{fields.source}: layer type {kind!r:.40} is not supported; supported: {_CONVOLUTION}, {FULL}"
            )
    return kinds
