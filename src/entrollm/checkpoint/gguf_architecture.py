"""What an architecture of GGUF files is in Hugging Face's terms."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from entrollm.checkpoint.gguf_changes import Changes
from entrollm.errors import UnsupportedError


class Values(Protocol):
    """The keys of a file's architecture, without its name."""

    def integer(self, name: str, default: int | None = None, *, low: int = 1) -> int:
        """An integer."""

    def number(self, name: str, default: float | None = None) -> float:
        """A finite number."""

    def flag(self, name: str, default: bool) -> bool:
        """A boolean."""

    def expect(self, name: str, expected: int, what: str) -> None:
        """Check an integer that may be there and must then have one value."""

    def integers(self, name: str, count: int) -> list[int]:
        """A list of `count` integers from 0; one integer stands for as many of it."""

    def flags(self, name: str, count: int) -> list[bool]:
        """A list of `count` booleans."""

    def has(self, name: str) -> bool:
        """Whether the key is there."""

    def has_tensor(self, name: str) -> bool:
        """Whether the file has a tensor."""

    def unsupported(self, name: str) -> UnsupportedError:
        """The error to raise for the value of a key."""


Extend = Callable[[Values, dict[str, Any]], dict[str, Any]]


def _nothing(values: Values, config: dict[str, Any]) -> dict[str, Any]:
    return {}


def _no_changes(config: Mapping[str, Any]) -> Changes:
    return {}


def _same_name(name: str, config: Mapping[str, Any]) -> str:
    return name


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """What one of llama.cpp's architectures is in Hugging Face's terms.

    Attributes:
        model_type, class_name: of config.json.
        extend: what the architecture adds to config.json, from the keys and from what all have.
        keys: keys that `extend` reads.
        parts: the names of a layer's tensors that are not the usual ones, without their end. In those of stacks, {}
            is the number of the expert.
        whole_names: the same, for names that differ in their end.
        alternating: the end of a tensor's name, each row of which comes after one of the tensor with the second end.
        following: the end of a stack's name, all rows of which come after those of the stack with the second end.
        rows: the ends of names that are matrices of one row, and vectors in the file.
        kernels: the ends of names that are kernels of convolutions, and matrices in the file.
        layers: what the names of tensors in layers begin with.
        outer: the names of tensors outside the layers that are not the usual ones.
        eps: the key of what norms add.
        rotates_part: only a part of each head may be rotated.
        norm_offset: how much more the weights of norms are in the file.
        interleaves: rows of queries and keys that are rotated together are neighbours in the file.
        has_qk_norms: queries and keys are normalised.
        has_windows: layers may see a part of the context alone.
        has_factors: the file may hold factors of the rotation, which are those of Llama 3.
        has_layer_sizes: layers may differ in their key-value heads, 0 being a layer without, and features.
        has_norm_biases: norms add a bias.
        has_head_bias: the output head may add a bias.
        biases: projections that may have biases, by the key of config.json that says so; "" if the model type does.
        loose_biases: the ends of names of biases that some layers may have.
        plain_norms: the ends of names of norms whose weights are the same in the file, whatever `norm_offset` is.
        has_own_heads: `extend` says how long heads are and how much of them is rotated.
        changes: what is done to tensors of layers, from config.json.
        final_name: the name of a tensor in the checkpoint, from the usual one and config.json.
    """

    model_type: str
    class_name: str
    extend: Extend = _nothing
    keys: frozenset[str] = frozenset()
    parts: Mapping[str, str] = field(default_factory=dict)
    whole_names: Mapping[str, str] = field(default_factory=dict)
    alternating: Mapping[str, str] = field(default_factory=dict)
    following: Mapping[str, str] = field(default_factory=dict)
    rows: tuple[str, ...] = ()
    kernels: tuple[str, ...] = ()
    layers: str = "model.layers."
    outer: Mapping[str, str] = field(default_factory=dict)
    eps: str = "attention.layer_norm_rms_epsilon"
    rotates_part: bool = False
    norm_offset: float = 0.0
    interleaves: bool = False
    has_qk_norms: bool = False
    has_windows: bool = False
    has_factors: bool = False
    has_layer_sizes: bool = False
    has_norm_biases: bool = False
    has_head_bias: bool = False
    biases: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    loose_biases: tuple[str, ...] = ()
    plain_norms: tuple[str, ...] = ()
    has_own_heads: bool = False
    changes: Callable[[Mapping[str, Any]], Changes] = _no_changes
    final_name: Callable[[str, Mapping[str, Any]], str] = _same_name


QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
ATTENTION = (*QKV, "self_attn.o_proj")
MLP = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
FULL, SLIDING = "full_attention", "sliding_attention"


def layer_kinds(values: Values, config: dict[str, Any], pattern: int) -> dict[str, Any]:
    """Windows in all layers but every `pattern`-th, if the file has a window."""
    layers = config["num_hidden_layers"]
    window = values.integer("attention.sliding_window", 0, low=0)
    pattern = values.integer("attention.sliding_window_pattern", pattern)
    kinds = [SLIDING if window and (index + 1) % pattern else FULL for index in range(layers)]
    return {"layer_types": kinds, "sliding_window": window or None}


GRANITE_FACTORS = frozenset({"attention.scale", "embedding_scale", "residual_scale", "logit_scale"})


def granite_factors(values: Values, config: dict[str, Any]) -> dict[str, Any]:
    """The factors of Granite models; 0 is no factor, as in llama.cpp."""
    return {
        "attention_multiplier": values.number("attention.scale", 0.0) or config["head_dim"] ** -0.5,
        "embedding_multiplier": values.number("embedding_scale", 0.0) or 1.0,
        "residual_multiplier": values.number("residual_scale", 0.0) or 1.0,
        "logits_scaling": values.number("logit_scale", 0.0) or 1.0,
    }


def rotated_granite(values: Values, config: dict[str, Any]) -> dict[str, Any]:
    """The same, of models whose positions are rotated.

    Raises:
        UnsupportedError: they are not, which this key says of Granite models alone.
    """
    if not values.flag("rope.scaling.finetuned", True):
        raise values.unsupported("rope.scaling.finetuned")
    return granite_factors(values, config)
