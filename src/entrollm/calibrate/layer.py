"""One decoder layer with dense weights, on any device: its forward pass, and attention over a window."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import MISSING, Field, dataclass, fields

import numpy as np
from numpy.typing import NDArray

from entrollm.arrays import Array, Device, functions, single
from entrollm.calibrate.arithmetic import rms_norm, rotate, softmax, swiglu
from entrollm.checkpoint.model_folder import Checkpoint
from entrollm.errors import FormatError, UnsupportedError
from entrollm.models.config import Block, ModelConfig
from entrollm.models.rope import RopeTables

NORM = "model.norm.weight"
_DIRECT = ("BF16", "F16", "F32")

Read = Callable[[str, tuple[int, ...]], Array]
See = Callable[[tuple[str, ...], Array], None]
"""Called with the names of matrices and what they read, (n, in_features)."""


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


class Tensors:
    """A checkpoint's tensors on a device."""

    def __init__(self, checkpoint: Checkpoint, device: Device) -> None:
        self._checkpoint = checkpoint
        self._device = device

    def __contains__(self, name: str) -> bool:
        return name in self._checkpoint.tensors

    def read(self, name: str, shape: tuple[int, ...]) -> Array:
        """A tensor in float32.

        Raises:
            FormatError: it is missing or has another shape.
        """
        return self._device.put(self._stored(name, shape))

    def hold(self, name: str, shape: tuple[int, ...]) -> Array:
        """A tensor that stays on the device, or raise as `read` does."""
        return self._device.hold(self._stored(name, shape))

    def held_bytes(self) -> int:
        """What `hold` of all tensors takes."""
        held = 0
        for name, info in self._checkpoint.tensors.items():
            weights = math.prod(info.shape)
            held += self._device.held_bytes(info.size_bytes, weights) if self._is_direct(name) else 4 * weights
        return held

    def _is_direct(self, name: str) -> bool:
        """Whether the file has the weights as they are; others are read in float32."""
        return self._checkpoint.tensors[name].dtype in _DIRECT and name not in self._checkpoint.imported

    def _stored(self, name: str, shape: tuple[int, ...]) -> NDArray[np.generic]:
        if name not in self._checkpoint.tensors:
            raise FormatError(f"{name}: the tensor is missing; config.json asks for shape {shape}")
        info = self._checkpoint.tensors[name]
        if info.shape != shape:
            raise FormatError(f"{name}: config.json asks for shape {shape}, found {info.shape}")
        if self._is_direct(name):
            return self._checkpoint.read(name)
        return self._checkpoint.read_float32(name)


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

    @property
    def shapes(self) -> dict[str, tuple[int, int]]:
        """(out_features, in_features) of the matrices."""
        parts = (self.qkv, self.output, self.gate_up, self.down)
        return {
            name: (rows, part.weight.shape[1])
            for part in parts
            for name, rows in zip(part.names, part.rows, strict=True)
        }

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

    def forward(self, x: Array, mix: Callable[[Array], Array], see: See | None = None) -> Array:
        """Run the layer.

        Args:
            x: float32 (n, hidden_size).
            mix: from the outputs of q, k and v side by side to the mixed values, (n, heads * head_dim).
            see: told of every matrix product.
        Returns:
            float32 (n, hidden_size).
        """

        def product(part: Part, x: Array) -> Array:
            if see is not None:
                see(part.names, x)
            return part(x)

        eps = self.config.norm_eps
        mixed = mix(product(self.qkv, rms_norm(x, self.attention_norm, eps)))
        middle = x + product(self.output, mixed)
        gate_up = product(self.gate_up, rms_norm(middle, self.mlp_norm, eps))
        middle += product(self.down, swiglu(gate_up))
        return middle


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
