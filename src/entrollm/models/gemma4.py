"""Gemma 4 (text): Gemma 3 with heads by kind of layer, shared keys and values, and inputs or experts in each layer."""

from dataclasses import replace

from entrollm.errors import FormatError, UnsupportedError
from entrollm.models.config import Beside, Experts, LayerInputs, LayerShape, ModelConfig, Norm, Routing, SharedKeys
from entrollm.models.config_fields import MAX_SIZE, Fields
from entrollm.models.experts import stacked_mlp
from entrollm.models.gemma2 import BLOCK, DEFAULTS
from entrollm.models.read import (
    FULL,
    SLIDING,
    Defaults,
    patterned_kinds,
    read_cap,
    read_decoder,
    rotated_heads,
    windows_of,
)
from entrollm.models.rope import Rope, read_rope_section

_DEFAULTS = replace(
    DEFAULTS,
    context_length=131072,
    sizes={
        "vocab_size": 262144,
        "hidden_size": 2304,
        "intermediate_size": 9216,
        "num_hidden_layers": 30,
        "num_attention_heads": 8,
    },
)
# The sections of rope_parameters where there are none.
_ROPES: dict[str, dict[str, object]] = {
    FULL: {"rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": 1e6},
    SLIDING: {"rope_type": "default", "rope_theta": 1e4},
}
_OWN_SIZES = ("head_dim", "num_key_value_heads")


def read_config(fields: Fields) -> ModelConfig:
    """Read a gemma4_text config.json, or the text_config of a gemma4 one."""
    return _read(fields, _DEFAULTS, window=512, input_size=256)


def read_unified_config(fields: Fields) -> ModelConfig:
    """Read a gemma4_unified_text config.json, or the text_config of a gemma4_unified one."""
    return _read(fields, replace(_DEFAULTS, context_length=262144), window=1024, input_size=0)


def _read(fields: Fields, defaults: Defaults, window: int, input_size: int) -> ModelConfig:
    if fields.raw("use_bidirectional_attention") not in (None, "vision"):
        raise UnsupportedError(f"{fields.source}: use_bidirectional_attention other than for vision is not supported")
    # Rotary embeddings are read by kind of layer, and only from rope_parameters, as in transformers.
    config = read_decoder(fields.without("rope_parameters", "rope_scaling"), defaults)
    kinds = patterned_kinds(fields, config.num_layers, 6)
    kinds[-1] = FULL
    shapes = _read_shapes(fields, config, kinds)
    sources = _read_sources(fields, kinds, shapes)
    if fields.flag("use_double_wide_mlp", False):
        shapes = [
            shape if source is None else replace(shape, intermediate_size=2 * shape.intermediate_size)
            for shape, source in zip(shapes, sources, strict=True)
        ]
    bias, same_values = fields.flag("attention_bias", False), fields.flag("attention_k_eq_v", False)
    has_experts = fields.flag("enable_moe_block", False)
    block = replace(BLOCK, mlp_norm=None if has_experts else BLOCK.mlp_norm, scale="layer_scalar")
    full = replace(block, qkv=block.qkv[:2]) if same_values else block
    experts = _read_experts(fields, config) if has_experts else None
    size = fields.integer("hidden_size_per_layer_input", input_size, low=0)
    vocab_size = fields.integer("vocab_size_per_layer_input", 262144) if size else 0
    ropes = _read_ropes(fields, defaults, kinds, shapes)
    return replace(
        config,
        norm=Norm(),
        block=block,
        layer_blocks=tuple(full if kind == FULL else block for kind in kinds),
        layer_shapes=tuple(shapes),
        layer_inputs=LayerInputs(size=size, vocab_size=vocab_size) if size else None,
        mixers=tuple(None if source is None else SharedKeys(source=source) for source in sources),
        experts=(experts,) * config.num_layers if experts else (),
        rope=ropes[-1],
        layer_ropes=tuple(ropes),
        qk_norm="head",
        has_value_norm=True,
        windows=windows_of(fields, kinds, window),
        embedding_scale=config.hidden_size**0.5,
        attention_scale=1.0,
        logit_cap=read_cap(fields, "final_logit_softcapping"),
        qkv_bias=bias,
        output_bias=bias,
    )


def _read_shapes(fields: Fields, config: ModelConfig, kinds: list[str]) -> list[LayerShape]:
    """The sizes of each layer: per_layer_config has them, or those of full layers have names of their own.

    Raises:
        FormatError: a value is malformed, or query heads do not share the keys evenly.
        UnsupportedError: per_layer_config has other fields.
    """
    own = fields.section("per_layer_config")
    shapes = []
    for index, kind in enumerate(kinds):
        head_dim, kv_heads = config.head_dim, config.num_kv_heads
        if "per_layer_config" in fields:
            section = own.section(str(index))
            for key in section.keys():  # noqa: SIM118 (not a mapping)
                if key not in _OWN_SIZES:
                    raise UnsupportedError(f"{section.source}: {key!r:.40} is not supported; only {_OWN_SIZES} are")
            head_dim = section.integer("head_dim", head_dim, high=2**16)
            kv_heads = section.integer("num_key_value_heads", kv_heads)
        elif kind == FULL:
            head_dim = fields.integer("global_head_dim", 512, high=2**16)
            if fields.flag("attention_k_eq_v", False):
                kv_heads = fields.optional_integer("num_global_key_value_heads", None) or kv_heads
        if config.num_heads % kv_heads:
            raise FormatError(
                f"{fields.source}: num_attention_heads {config.num_heads} is not a multiple of the {kv_heads} "
                f"key-value heads of layer {index}"
            )
        shapes.append(LayerShape(num_kv_heads=kv_heads, head_dim=head_dim, intermediate_size=config.intermediate_size))
    return shapes


def _read_sources(fields: Fields, kinds: list[str], shapes: list[LayerShape]) -> list[int | None]:
    """For each layer, the one whose keys and values it reads; None for its own.

    Raises:
        FormatError: a layer that has none of its own follows none of its kind, or the last of them has other heads.
    """
    shared = fields.integer("num_kv_shared_layers", 0, low=0, high=len(kinds))
    first = len(kinds) - shared
    last = {kind: index for index, kind in enumerate(kinds[:first])}
    if shared and not set(kinds) <= last.keys():
        raise FormatError(
            f"{fields.source}: num_kv_shared_layers {shared} of {len(kinds)} leaves no layer with keys of its own for "
            "each kind in layer_types"
        )
    for index in range(first, len(kinds)):
        source = last[kinds[index]]
        if shapes[index] != shapes[source]:
            raise FormatError(
                f"{fields.source}: layer {index} shares the keys of layer {source}, but per_layer_config gives them "
                "other head_dim or num_key_value_heads"
            )
    return [None if index < first else last[kind] for index, kind in enumerate(kinds)]


def _read_ropes(fields: Fields, defaults: Defaults, kinds: list[str], shapes: list[LayerShape]) -> list[Rope]:
    """The rotary embedding of each layer; layers with the same heads share one.

    Raises:
        FormatError, UnsupportedError: as for `read_rope_section`.
    """
    found: dict[tuple[str, int], Rope] = {}
    parameters = fields.section("rope_parameters") if "rope_parameters" in fields else Fields(_ROPES, fields.source)
    for kind, shape in zip(kinds, shapes, strict=True):
        if (kind, shape.head_dim) not in found:
            section = parameters.section(kind)
            # Only this type honours partial_rotary_factor.
            partial = 1.0 if section.raw("rope_type") == "proportional" else None
            heads = replace(rotated_heads(fields, defaults, shape.head_dim), partial=partial)
            found[kind, shape.head_dim] = read_rope_section(fields.only(), section, heads, 1e4)
    return [found[kind, shape.head_dim] for kind, shape in zip(kinds, shapes, strict=True)]


def _read_experts(fields: Fields, config: ModelConfig) -> Experts:
    """The experts of every layer and the part beside them."""
    count, used = fields.integer("num_experts", high=2**16), fields.integer("top_k_experts", high=2**16)
    if used > count:
        raise FormatError(f"{fields.source}: top_k_experts {used} is more than num_experts {count}")
    stack = stacked_mlp("experts", fields.integer("moe_intermediate_size", high=MAX_SIZE))
    return Experts(
        count=count,
        used=used,
        router="router.proj",
        expert=stack,
        stack=stack,
        normalises=True,
        routing=Routing(norm="router.scale", norm_scale=config.hidden_size**-0.5, factors="router.per_expert_scale"),
        beside=Beside(
            norm="pre_feedforward_layernorm",
            output_norm="post_feedforward_layernorm_1",
            experts_norm="pre_feedforward_layernorm_2",
            experts_output_norm="post_feedforward_layernorm_2",
        ),
    )
