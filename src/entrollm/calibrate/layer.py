"""One decoder layer with dense weights, and its attention over a window, for gradients by hand."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import MISSING, Field, dataclass, fields

import numpy as np
from numpy.typing import NDArray

from entrollm.arrays import Array, Device, functions, single
from entrollm.calibrate.arithmetic import rms_norm, rotate, softmax
from entrollm.errors import UnsupportedError
from entrollm.models.config import Block, ModelConfig
from entrollm.models.rope import RopeTables

NORM = "model.norm.weight"

Read = Callable[[str, tuple[int, ...]], Array]


# Options of a ModelConfig that the arithmetic here follows; the others must have their defaults.
_FOLLOWED = frozenset(
    {"windows", "qkv_bias", "output_bias", "mlp_bias", "qk_norm", "block", "bos_token_id", "eos_token_ids"}
)
_BLOCKS = (Block(), Block(qkv=("self_attn.qkv_proj",), up=("mlp.gate_up_proj",)))


def check_arithmetic(config: ModelConfig) -> None:
    """Refuse models whose layers are computed otherwise than here.

    Raises:
        UnsupportedError: an option of the model is not followed; the message names it.
    """
    changed = [
        item.name
        for item in fields(ModelConfig)
        if item.name not in _FOLLOWED and _differs(getattr(config, item.name), item)
    ]
    if config.qk_norm == "width":
        changed.append("qk_norm")
    if config.block not in _BLOCKS:
        changed.append("block")
    if changed:
        raise UnsupportedError(
            f"tuning does not follow these options of {config.model_type}: {', '.join(changed)}; "
            "compress it without tuning"
        )


def _differs(value: object, item: Field[object]) -> bool:
    """Whether an option that has a default is not at it."""
    if item.default is not MISSING:
        return value != item.default
    return item.default_factory is not MISSING and value != item.default_factory()


@dataclass(frozen=True)
class Part:
    """Matrices on one input, stacked.

    Attributes:
        names: of the tensors.
        rows: of each.
        weight: (out_features, in_features).
        bias: float32 (out_features,) or 0.
    """

    names: tuple[str, ...]
    rows: tuple[int, ...]
    weight: Array
    bias: Array

    def __call__(self, x: Array) -> Array:
        """float32 (n, in_features) -> a new float32 (n, out_features)."""
        y = x @ single(self.weight).T
        y += self.bias
        return y


class LayerWeights:
    """The tensors of one layer.

    Args:
        config: the model's.
        matrix: a matrix by name and shape.
        vector: a norm or bias, in float32.
        index: the layer.
    Raises:
        FormatError: a tensor is missing or has the wrong shape.
    """

    def __init__(self, config: ModelConfig, matrix: Read, vector: Read, index: int) -> None:
        prefix = f"model.layers.{index}."
        hidden, inner = config.hidden_size, config.intermediate_size
        wide, narrow = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        qkv = {"q_proj": wide, "k_proj": narrow, "v_proj": narrow}
        gate_up = {"gate_proj": inner, "up_proj": inner}
        if config.is_fused:
            qkv, gate_up = {"qkv_proj": wide + 2 * narrow}, {"gate_up_proj": 2 * inner}

        def part(place: str, outputs: dict[str, int], columns: int, has_bias: bool) -> Part:
            names = [f"{prefix}{place}.{name}" for name in outputs]
            pairs = list(zip(names, outputs.values(), strict=True))
            weight = _join([matrix(f"{name}.weight", (rows, columns)) for name, rows in pairs])
            bias = _join([vector(f"{name}.bias", (rows,)) for name, rows in pairs]) if has_bias else 0.0
            return Part(tuple(f"{name}.weight" for name in names), tuple(outputs.values()), weight, bias)

        self.config = config
        self.window = config.windows[index]
        self.attention_norm = vector(f"{prefix}input_layernorm.weight", (hidden,))
        self.mlp_norm = vector(f"{prefix}post_attention_layernorm.weight", (hidden,))
        self.qkv = part("self_attn", qkv, hidden, config.qkv_bias)
        self.output = part("self_attn", {"o_proj": hidden}, wide, config.output_bias)
        self.gate_up = part("mlp", gate_up, hidden, config.mlp_bias)
        self.down = part("mlp", {"down_proj": hidden}, inner, config.mlp_bias)
        self.qk_norm: Array | None = None
        if config.qk_norm:
            q_norm, k_norm = (
                vector(f"{prefix}self_attn.{name}_norm.weight", (config.head_dim,)) for name in ("q", "k")
            )
            norms = [q_norm] * config.num_heads + [k_norm] * config.num_kv_heads
            self.qk_norm = functions(q_norm).stack(norms)

    def heads(self, qkv: Array, tables: tuple[Array, Array]) -> tuple[Array, Array, Array]:
        """Split the outputs of q, k and v, (n, all side by side), into queries, keys and values.

        Returns:
            float32 (n, heads or kv_heads, head_dim) each, normalised and rotated.
        """
        config = self.config
        split = qkv.reshape(len(qkv), -1, config.head_dim)
        raw = split[:, : config.num_heads + config.num_kv_heads]
        qk = raw if self.qk_norm is None else rms_norm(raw, self.qk_norm, config.norm_eps)
        qk = rotate(qk, *tables)
        return qk[:, : config.num_heads], qk[:, config.num_heads :], split[:, config.num_heads + config.num_kv_heads :]


class WindowAttention:
    """Causal attention within a window of tokens, from an empty context.

    Args:
        layer: whose attention it is.
        tables: cosines and sines of the n positions, on the layer's device.
        mask: float32 (n, n), 0 where a token sees another and -inf elsewhere; see `causal_mask`.
    """

    def __init__(self, layer: LayerWeights, tables: tuple[Array, Array], mask: Array) -> None:
        self.layer = layer
        self.tables = tables
        self._mask = mask
        self.scale = layer.config.head_dim**-0.5

    def __call__(self, qkv: Array) -> Array:
        """float32 (n, q, k and v side by side) -> float32 (n, heads * head_dim)."""
        config, n = self.layer.config, len(qkv)
        self.qkv = qkv
        queries, keys, values = self.layer.heads(qkv, self.tables)
        # (kv_heads, group, n, head_dim) and (kv_heads, 1, n, head_dim)
        queries = queries.swapaxes(0, 1).reshape(config.num_kv_heads, -1, n, config.head_dim)
        self.queries = queries * self.scale
        self.keys = keys.swapaxes(0, 1)[:, None]
        self.values = values.swapaxes(0, 1)[:, None]
        scores = self.queries @ self.keys.swapaxes(2, 3)
        scores += self._mask
        self.shares = softmax(scores)
        mixed = self.shares @ self.values
        return mixed.reshape(config.num_heads, n, config.head_dim).swapaxes(0, 1).reshape(n, -1)


def causal_mask(tokens: int, window: int | None) -> NDArray[np.float32]:
    """What is added to the scores of a window: 0, or -inf where a token (row) does not see another (column)."""
    rows, columns = np.arange(tokens)[:, None], np.arange(tokens)
    hidden = columns > rows
    if window is not None:
        hidden |= columns <= rows - window
    return np.where(hidden, np.float32(-np.inf), np.float32(0))


def rotation(config: ModelConfig, tokens: int, device: Device) -> tuple[Array, Array]:
    """Cosines and sines of the positions of a window, on a device."""
    cosines, sines = RopeTables(config.rope).rows(0, tokens, config.rope.is_long(tokens))
    return device.put(cosines), device.put(sines)


def _join(parts: list[Array]) -> Array:
    return parts[0] if len(parts) == 1 else functions(parts[0]).concatenate(parts, axis=0)
