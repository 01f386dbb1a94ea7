"""What the config.json files of different architectures have in common, read and checked."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

from entrollm.errors import FormatError, UnsupportedError
from entrollm.models.config import ModelConfig
from entrollm.models.config_fields import MAX_FACTOR, Fields
from entrollm.models.rope import RotatedHeads, read_rope, read_rope_section

_MAX_LAYERS = 4096
_MAX_CONTEXT = 2**31
# What use_sliding_window turns on where there is no sliding_window.
_LAYERED_WINDOW = 4096
# Names of activations in config.json, and what they are called here.
_ACTIVATIONS: Mapping[str, str] = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu2": "relu2",
}
FULL, SLIDING = "full_attention", "sliding_attention"


@dataclass(frozen=True, kw_only=True)
class Defaults:
    """What an architecture assumes where config.json is silent; the values are those of transformers.

    Attributes:
        context_length: max_position_embeddings.
        original_context_length: original_max_position_embeddings, if that is a field of its own; None for the
            context length.
        head_dim: features per head; None for hidden_size / heads.
        has_own_head_dim: head_dim is read from config.json.
        kv_heads: key-value heads; None for as many as query heads, which null always means.
        norm_eps: added to the mean square.
        theta: the base of the rotary frequencies.
        tied: the output head is the embedding.
        bos_token_id: the start token; None if the architecture assumes none.
        eos_token_id: the end token; None if the architecture assumes none.
        partial_rotary: the share of each head that is rotated; None if the architecture rotates all, always.
        rope_aliases: names of rope types that mean another one.
        keys: names of fields in config.json that are not the usual ones, by the usual name.
        sizes: dimensions that config.json may leave out, by the usual name.
    """

    context_length: int
    original_context_length: int | None = None
    head_dim: int | None = None
    has_own_head_dim: bool = True
    kv_heads: int | None = None
    norm_eps: float = 1e-6
    theta: float = 10000.0
    tied: bool = False
    bos_token_id: int | None = None
    eos_token_id: int | None = None
    activation: str = "silu"
    partial_rotary: float | None = None
    rope_aliases: Mapping[str, str] = field(default_factory=dict)
    keys: Mapping[str, str] = field(default_factory=dict)
    sizes: Mapping[str, int] = field(default_factory=dict)

    def key(self, usual: str) -> str:
        """The name in config.json of a field."""
        return self.keys.get(usual, usual)


def read_decoder(fields: Fields, defaults: Defaults) -> ModelConfig:
    """Read what all architectures share; every layer sees all tokens and no projection has a bias.

    The sizes of the model must be there unless the architecture has a default; everything else has one.

    Raises:
        FormatError: a value is missing, of the wrong type, out of range or inconsistent with another.
        UnsupportedError: the activation or the rotary embedding is not implemented.
    """

    def size(key: str, high: int | None = None) -> int:
        limits = {} if high is None else {"high": high}
        return fields.integer(defaults.key(key), defaults.sizes.get(key), **limits)

    hidden_size, num_heads = size("hidden_size"), size("num_attention_heads")
    num_kv_heads = fields.optional_integer("num_key_value_heads", defaults.kv_heads) or num_heads
    if num_heads % num_kv_heads:
        raise FormatError(
            f"{fields.source}: num_attention_heads {num_heads} is not a multiple of num_key_value_heads {num_kv_heads}"
        )
    head_dim = None
    if defaults.has_own_head_dim:
        head_dim = fields.optional_integer("head_dim", defaults.head_dim, high=2**16)
    if head_dim is None:
        if hidden_size % num_heads:
            raise FormatError(
                f"{fields.source}: hidden_size {hidden_size} is not a multiple of num_attention_heads {num_heads}"
            )
        head_dim = hidden_size // num_heads
    num_layers = size("num_hidden_layers", high=_MAX_LAYERS)
    heads = rotated_heads(fields, defaults, head_dim)
    rope = read_rope(fields, heads)
    return ModelConfig(
        model_type=fields.text("model_type"),
        vocab_size=size("vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=size("intermediate_size"),
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        norm_eps=fields.number(defaults.key("rms_norm_eps"), defaults.norm_eps, high=1.0),
        context_length=int(heads.context_length * rope.context_factor),
        tied_embeddings=fields.flag("tie_word_embeddings", defaults.tied),
        rope=rope,
        windows=(None,) * num_layers,
        activation=read_activation(fields, defaults.key("hidden_act"), defaults.activation),
        bos_token_id=next(iter(fields.token_ids("bos_token_id", defaults.bos_token_id)), None),
        eos_token_ids=fields.token_ids("eos_token_id", defaults.eos_token_id),
    )


def read_activation(fields: Fields, key: str, default: str) -> str:
    """The activation that config.json names, as ModelConfig has it.

    Raises:
        UnsupportedError: it is not implemented.
    """
    name = fields.text(key, default)
    if name not in _ACTIVATIONS:
        raise UnsupportedError(
            f"{fields.source}: {key} {name!r} is not supported; supported: {', '.join(sorted(_ACTIVATIONS))}"
        )
    return _ACTIVATIONS[name]


def rotated_heads(fields: Fields, defaults: Defaults, head_dim: int) -> RotatedHeads:
    """What the rotary embeddings of a model need to know of it."""
    return RotatedHeads(
        head_dim,
        fields.integer(defaults.key("max_position_embeddings"), defaults.context_length, high=_MAX_CONTEXT),
        defaults.original_context_length,
        partial=defaults.partial_rotary,
        aliases=defaults.rope_aliases,
        theta=defaults.theta,
        keys=defaults.keys,
    )


def read_cap(fields: Fields, key: str, default: float | None = None) -> float | None:
    """A bound of scores or logits; the default when absent, None for null."""
    if not fields.has(key):
        return default
    return fields.factor(key) if key in fields else None


def refuse_flags(fields: Fields, *keys: str) -> None:
    """Refuse options that are on.

    Raises:
        UnsupportedError: one is; the message names it.
    """
    for key in keys:
        if fields.flag(key, False):
            raise UnsupportedError(f"{fields.source}: {key} is not supported")


def uniform_windows(fields: Fields, num_layers: int, default: int | None = None) -> tuple[int | None, ...]:
    """The same sliding_window, by default `default` and none for null, for every layer."""
    return (fields.optional_integer("sliding_window", default, high=_MAX_CONTEXT),) * num_layers


def layer_kinds(fields: Fields, num_layers: int) -> list[str] | None:
    """The layer_types of a model; None if it does not list them.

    Raises:
        FormatError: they are malformed.
        UnsupportedError: a layer type other than full_attention and sliding_attention.
    """
    if "layer_types" not in fields:
        return None
    kinds = fields.texts("layer_types", num_layers)
    for kind in kinds:
        if kind not in (FULL, SLIDING):
            raise UnsupportedError(
                f"{fields.source}: layer type {kind!r} is not supported; supported: {FULL}, {SLIDING}"
            )
    return kinds


def patterned_kinds(fields: Fields, num_layers: int, pattern: int) -> list[str]:
    """The layer_types of a model, by default every `pattern`-th layer full and the others sliding."""
    kinds = layer_kinds(fields, num_layers)
    return kinds or [FULL if pattern and (index + 1) % pattern == 0 else SLIDING for index in range(num_layers)]


def windows_of(fields: Fields, kinds: list[str], default: int | None) -> tuple[int | None, ...]:
    """sliding_window, by default `default`, for the sliding layers.

    Raises:
        FormatError: it is malformed, or layers slide without a window.
    """
    window = fields.optional_integer("sliding_window", default, high=_MAX_CONTEXT)
    return _sliding(fields, kinds, window)


def _sliding(fields: Fields, kinds: list[str], window: int | None) -> tuple[int | None, ...]:
    """The window for the sliding layers, which must have one."""
    if window is None and SLIDING in kinds:
        raise FormatError(f"{fields.source}: layer_types has {SLIDING}, but no sliding_window is in use")
    return tuple(window if kind == SLIDING else None for kind in kinds)


def layered_windows(
    fields: Fields, num_layers: int, slides: Callable[[int, int], bool] = operator.ge
) -> tuple[int | None, ...]:
    """The windows of a model with use_sliding_window, max_window_layers and layer_types.

    Args:
        fields: the configuration.
        num_layers: of the model.
        slides: whether a layer slides, from its number and max_window_layers, where there are no layer_types.
    Raises:
        FormatError: a value is malformed, or layers slide without a window.
        UnsupportedError: a layer type other than full_attention and sliding_attention.
    """
    window = None
    if fields.flag("use_sliding_window", False):
        window = fields.optional_integer("sliding_window", _LAYERED_WINDOW, high=_MAX_CONTEXT)
    kinds = layer_kinds(fields, num_layers)
    if kinds is None:
        limit = fields.integer("max_window_layers", 28, low=0)
        return tuple(window if slides(index, limit) else None for index in range(num_layers))
    return _sliding(fields, kinds, window)


def with_ropes_by_kind(
    config: ModelConfig,
    fields: Fields,
    defaults: Defaults,
    thetas: Mapping[str, tuple[str | None, float]],
    kinds: list[str],
) -> ModelConfig:
    """A model whose full and sliding layers have rotary embeddings of their own.

    Args:
        config: the model.
        fields: its config.json. rope_parameters holds a section for each kind; the older rope_scaling is that of full
            layers alone.
        defaults: of the architecture.
        thetas: for each kind, the key of the base of the frequencies where its section has none (None if there is no
            such key), and its default.
        kinds: of the layers.
    Raises:
        FormatError, UnsupportedError: as for `read_rope`.
    """
    heads = rotated_heads(fields, defaults, config.head_dim)
    parameters = fields.section("rope_parameters")
    for found in parameters.keys():  # noqa: SIM118 (not a mapping)
        if found not in thetas:
            raise FormatError(
                f"{parameters.source}: {found!r:.40} is not a kind of layer; expected {', '.join(thetas)}"
            )
    # The sections alone say what the original context length is.
    partial = fields.only("partial_rotary_factor")
    ropes = {}
    for kind, (key, default) in thetas.items():
        section = parameters.section(kind)
        if kind == FULL and fields.raw("rope_scaling"):
            section = section.updated(fields.section("rope_scaling"))
        theta = default if key is None else fields.number(key, default, low=1.0, high=MAX_FACTOR)
        ropes[kind] = read_rope_section(partial, section, heads, theta)
    return replace(
        config,
        rope=ropes[FULL],
        layer_ropes=tuple(ropes[kind] for kind in kinds),
        context_length=int(heads.context_length * ropes[FULL].context_factor),
    )
