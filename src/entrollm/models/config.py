"""What config.json says about a decoder, checked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from entrollm.errors import FormatError, UnsupportedError
from entrollm.models.config_fields import Fields
from entrollm.models.rope import Rope, RotatedHeads, read_rope

_MAX_LAYERS = 4096
_MAX_CONTEXT = 2**31
# What use_sliding_window turns on where there is no sliding_window.
_LAYERED_WINDOW = 4096


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The shape of a decoder-only transformer and the options in which architectures differ.

    Attributes:
        model_type: as in config.json.
        context_length: tokens of prompt and answer together that the model was made for.
        tied_embeddings: the output head is the embedding matrix.
        rope: the rotary position embedding.
        windows: per layer, how many tokens back (itself included) a token sees; None for all.
        qkv_bias, output_bias, mlp_bias: which projections add a bias.
        qk_norm: queries and keys are normalised per head.
        fused: q, k and v are one matrix, and so are gate and up.
        bos_token_id: the token that starts a text, if any.
        eos_token_ids: the tokens that end one.
    """

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    norm_eps: float
    context_length: int
    tied_embeddings: bool
    rope: Rope
    windows: tuple[int | None, ...]
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    fused: bool = False
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()


@dataclass(frozen=True)
class Defaults:
    """What an architecture assumes where config.json is silent; the values are those of transformers.

    Attributes:
        context_length: max_position_embeddings.
        original_context_length: original_max_position_embeddings, if that is a field of its own; None for the
            context length.
        head_dim: features per head; None for hidden_size / heads.
        kv_heads: key-value heads; None for as many as query heads, which null always means.
        bos_token_id, eos_token_id: the start and the end token; None if the architecture assumes none.
        partial_rotary: the architecture can rotate a part of each head.
        rope_aliases: names of rope types that mean another one.
    """

    context_length: int
    original_context_length: int | None = None
    head_dim: int | None = None
    kv_heads: int | None = None
    norm_eps: float = 1e-6
    bos_token_id: int | None = None
    eos_token_id: int | None = None
    partial_rotary: bool = False
    rope_aliases: Mapping[str, str] = field(default_factory=dict)


def read_decoder(fields: Fields, defaults: Defaults) -> ModelConfig:
    """Read what all architectures share; every layer sees all tokens and no projection has a bias.

    The sizes of the model must be there; everything else has the architecture's default.

    Raises:
        FormatError: a value is missing, of the wrong type, out of range or inconsistent with another.
        UnsupportedError: the activation or the rotary embedding is not implemented.
    """
    activation = fields.text("hidden_act", "silu")
    if activation not in ("silu", "swish"):
        raise UnsupportedError(f"{fields.source}: hidden_act {activation!r} is not supported; supported: silu")
    hidden_size = fields.integer("hidden_size")
    num_heads = fields.integer("num_attention_heads")
    num_kv_heads = fields.optional_integer("num_key_value_heads", defaults.kv_heads) or num_heads
    if num_heads % num_kv_heads:
        raise FormatError(
            f"{fields.source}: num_attention_heads {num_heads} is not a multiple of num_key_value_heads {num_kv_heads}"
        )
    head_dim = fields.optional_integer("head_dim", high=2**16) or defaults.head_dim
    if head_dim is None:
        if hidden_size % num_heads:
            raise FormatError(
                f"{fields.source}: hidden_size {hidden_size} is not a multiple of num_attention_heads {num_heads}"
            )
        head_dim = hidden_size // num_heads
    num_layers = fields.integer("num_hidden_layers", high=_MAX_LAYERS)
    context_length = fields.integer("max_position_embeddings", defaults.context_length, high=_MAX_CONTEXT)
    heads = RotatedHeads(
        head_dim,
        context_length,
        defaults.original_context_length,
        is_partial=defaults.partial_rotary,
        aliases=defaults.rope_aliases,
    )
    rope = read_rope(fields, heads)
    return ModelConfig(
        model_type=fields.text("model_type"),
        vocab_size=fields.integer("vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=fields.integer("intermediate_size"),
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        norm_eps=fields.number("rms_norm_eps", defaults.norm_eps, high=1.0),
        context_length=int(context_length * rope.context_factor),
        tied_embeddings=fields.flag("tie_word_embeddings", False),
        rope=rope,
        windows=(None,) * num_layers,
        bos_token_id=next(iter(fields.token_ids("bos_token_id", defaults.bos_token_id)), None),
        eos_token_ids=fields.token_ids("eos_token_id", defaults.eos_token_id),
    )


def uniform_windows(fields: Fields, num_layers: int, default: int | None = None) -> tuple[int | None, ...]:
    """The same sliding_window, by default `default` and none for null, for every layer."""
    return (fields.optional_integer("sliding_window", default, high=_MAX_CONTEXT),) * num_layers


def layered_windows(fields: Fields, num_layers: int) -> tuple[int | None, ...]:
    """The windows of a model with use_sliding_window, max_window_layers and layer_types.

    Raises:
        FormatError: a value is malformed, or layers slide without a window.
        UnsupportedError: a layer type other than full_attention and sliding_attention.
    """
    window = None
    if fields.flag("use_sliding_window", False):
        window = fields.optional_integer("sliding_window", _LAYERED_WINDOW, high=_MAX_CONTEXT)
    if "layer_types" not in fields:
        first = fields.integer("max_window_layers", 28, low=0)
        return tuple(window if index >= first else None for index in range(num_layers))
    kinds = fields.texts("layer_types", num_layers)
    for kind in kinds:
        if kind not in ("full_attention", "sliding_attention"):
            raise UnsupportedError(
                f"{fields.source}: layer type {kind!r} is not supported; supported: full_attention, sliding_attention"
            )
    if window is None and "sliding_attention" in kinds:
        raise FormatError(f"{fields.source}: layer_types has sliding_attention, but no sliding_window is in use")
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)
