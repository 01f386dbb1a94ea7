"""Self-attention: projections, norms and rotation of queries and keys, and the mixing of values."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from entrollm import _core
from entrollm.engine.arithmetic import plain_attention, rotate_neighbours, sigmoid
from entrollm.engine.layer_cache import Attention, Positions
from entrollm.engine.projection import Projection, offset_weight
from entrollm.engine.weights import Floats, Weights, load_tensor
from entrollm.models.config import ModelConfig
from entrollm.models.rope import Rope, RopeTables


@dataclass(frozen=True)
class Angles:
    """What is done to the queries and keys of n positions.

    Attributes:
        cosines, sines: of the rotation, float32 (n, 1, rotary_dim / 2).
        query_factors: what queries are multiplied by, float32 (n, 1, 1); None if by 1.
    """

    cosines: Floats
    sines: Floats
    query_factors: Floats | None = None


class Rotations:
    """The angles of all layers, of which many share theirs."""

    def __init__(self, config: ModelConfig) -> None:
        self._ropes = config.ropes
        distinct = {id(rope): rope for rope in self._ropes if rope is not None}
        self._tables: dict[int, tuple[Rope, RopeTables]] = {
            key: (rope, RopeTables(rope)) for key, rope in distinct.items()
        }

    def is_long(self, length: int) -> bool:
        """Whether a sequence of `length` tokens uses the long frequencies of a rotary embedding."""
        return any(rope.is_long(length) for rope, _ in self._tables.values())

    def rows(self, start: int, count: int, is_long: bool) -> list[Angles | None]:
        """The angles of each layer at the positions from `start`; None for a layer that does not rotate."""
        rows = {
            key: Angles(*tables.rows(start, count, is_long), tables.query_factors(start, count))
            for key, (_, tables) in self._tables.items()
        }
        return [rows.get(id(rope)) for rope in self._ropes]


class SelfAttention:
    """The attention of one layer.

    Raises:
        FormatError: a tensor is missing or has another shape.
    """

    def __init__(self, config: ModelConfig, weights: Weights, prefix: str) -> None:
        self._config = config
        self._pool = weights.pool
        block, hidden = config.block, config.hidden_size
        wide, narrow = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        queries = 2 * wide if config.has_output_gate else wide
        sizes = [queries + 2 * narrow] if config.is_fused else [queries, narrow, narrow][: len(block.qkv)]
        qkv = {prefix + name: size for name, size in zip(block.qkv, sizes, strict=True)}
        self._qkv = Projection(weights, qkv, hidden, config.qkv_bias, block.is_transposed)
        output = {prefix + block.output: hidden}
        self._output = Projection(weights, output, wide, config.output_bias, block.is_transposed)
        self._head_norms: Floats | None = None
        self._width_norms: tuple[Floats, Floats] | None = None
        names = (f"{prefix}{block.q_norm}.weight", f"{prefix}{block.k_norm}.weight")
        if config.qk_norm == "head":
            q, k = (offset_weight(config, load_tensor(weights, name, (config.head_dim,))) for name in names)
            self._head_norms = np.stack([q] * config.num_heads + [k] * config.num_kv_heads)
        elif config.qk_norm == "width":
            q, k = (load_tensor(weights, name, (size,)) for name, size in zip(names, (wide, narrow), strict=True))
            self._width_norms = offset_weight(config, q), offset_weight(config, k)
        self._value_norm: Floats | None = None
        if config.has_value_norm:
            self._value_norm = np.ones((config.num_kv_heads, config.head_dim), dtype=np.float32)
        self._sinks: Floats | None = None
        if config.has_sinks:
            self._sinks = load_tensor(weights, prefix + block.sinks, (config.num_heads,))
        is_native = config.attention_cap is None and self._sinks is None
        self._query_factor: np.float32 | None = None
        if not is_native:
            # The native attention scales its scores; the plain one leaves them as they are.
            self._query_factor = np.float32(config.attention_scale or config.head_dim**-0.5)
        elif config.attention_scale is not None:
            self._query_factor = np.float32(config.attention_scale * config.head_dim**0.5)
        self._mix = self._mix_natively if is_native else self._mix_plainly

    def __call__(self, x: Floats, angles: Angles | None, cache: Attention) -> Floats:
        """float32 (n, hidden_size), normalised -> float32 (n, hidden_size)."""
        config = self._config
        heads, rotated_heads = config.num_heads, config.num_heads + config.num_kv_heads
        qkv = self._qkv(x).reshape(len(x), -1, config.head_dim)
        if config.is_qkv_by_head:
            by_head = qkv.reshape(len(x), config.num_kv_heads, -1, config.head_dim).swapaxes(1, 2)
            qkv = np.ascontiguousarray(by_head).reshape(qkv.shape)
        gate: Floats | None = None
        if config.has_output_gate:
            pairs = qkv[:, : 2 * heads].reshape(len(x), heads, 2, config.head_dim)
            gate = sigmoid(pairs[:, :, 1]).reshape(len(x), -1)
            qkv = np.concatenate([pairs[:, :, 0], qkv[:, 2 * heads :]], axis=1)
        qk = qkv[:, :rotated_heads]
        # Norms make new keys, so that values may be the ones before them.
        values = qkv[:, -config.num_kv_heads :]
        if self._value_norm is not None:
            values = _core.rms_norm(np.ascontiguousarray(values), self._value_norm, config.norm_eps, self._pool)
        if self._head_norms is not None:
            qk = _core.rms_norm(np.ascontiguousarray(qk), self._head_norms, config.norm_eps, self._pool)
        elif self._width_norms is not None:
            qk = self._normalised(qk, self._width_norms)
        if angles is not None and config.has_rotated_neighbours:
            rotate_neighbours(qk, angles.cosines, angles.sines)
        elif angles is not None:
            _core.rotate(qk, angles.cosines, angles.sines, self._pool)
        queries = qk[:, :heads]
        if self._query_factor is not None:
            queries *= self._query_factor
        if angles is not None and angles.query_factors is not None:
            queries *= angles.query_factors
        mixed = cache.attend(queries, qk[:, heads:], values, self._mix)
        if gate is not None:
            mixed *= gate
        return self._output(mixed)

    def native(self, surroundings: _core.Surroundings) -> _core.AttentionBlock | None:
        """This part with what surrounds it as native code; None if that lacks an option or a kind of matrix.

        Raises:
            CorruptStreamError: the bytes of a matrix are damaged.
        """
        config = self._config
        is_plain = config.attention_cap is None and not (config.has_sinks or config.has_output_gate)
        if config.is_qkv_by_head or config.has_rotated_neighbours or config.has_value_norm or not is_plain:
            return None
        qkv, output = self._qkv.native(), self._output.native()
        if qkv is None or output is None:
            return None
        factor = None if self._query_factor is None else float(self._query_factor)
        shape = _core.AttentionShape(config.num_heads, config.num_kv_heads, config.head_dim, factor)
        heads = None if self._head_norms is None else self._head_norms.reshape(-1)
        query, key = self._width_norms or (None, None)
        return _core.AttentionBlock(qkv, output, surroundings, shape, heads, query, key)

    def _normalised(self, qk: Floats, norms: tuple[Floats, Floats]) -> Floats:
        """Queries and keys, each normalised over its whole width."""
        heads = self._config.num_heads
        parts = [
            _core.rms_norm(part.reshape(len(qk), -1), weight, self._config.norm_eps, self._pool)
            for part, weight in zip((qk[:, :heads], qk[:, heads:]), norms, strict=True)
        ]
        return np.concatenate(parts, axis=1).reshape(qk.shape)

    def _mix_natively(self, queries: Floats, positions: Positions) -> Floats:
        keys, values, window, scales, earlier = positions[1:]
        return _core.attention(queries, keys, values, window, self._pool, scales, earlier)

    def _mix_plainly(self, queries: Floats, positions: Positions) -> Floats:
        bound = self._config.attention_cap
        return plain_attention(queries, *positions.floats(), positions.window, bound=bound, sinks=self._sinks)
