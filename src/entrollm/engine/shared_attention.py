"""Attention over the keys and values that an earlier layer has added, so that a layer has queries alone."""

from __future__ import annotations

import numpy as np

from entrollm import _core
from entrollm.engine.attention import Angles
from entrollm.engine.layer_cache import Attention, Positions
from entrollm.engine.projection import Projection, offset_weight
from entrollm.engine.weights import Floats, Weights, load_tensor
from entrollm.models.config import ModelConfig


class SharedAttention:
    """The attention of a layer without keys and values; its queries are normalised per head.

    Raises:
        FormatError: a tensor is missing or has another shape.
    """

    def __init__(self, config: ModelConfig, weights: Weights, prefix: str) -> None:
        self._config, self._pool = config, weights.pool
        block, wide = config.block, config.num_heads * config.head_dim
        self._queries = Projection(weights, {prefix + block.qkv[0]: wide}, config.hidden_size, config.qkv_bias)
        self._output = Projection(weights, {prefix + block.output: config.hidden_size}, wide, config.output_bias)
        weight = offset_weight(config, load_tensor(weights, f"{prefix}{block.q_norm}.weight", (config.head_dim,)))
        # The native attention scales its scores.
        factor = 1.0 if config.attention_scale is None else config.attention_scale * config.head_dim**0.5
        self._norm = np.tile(weight * np.float32(factor), (config.num_heads, 1))

    def __call__(self, x: Floats, angles: Angles | None, cache: Attention) -> Floats:
        """float32 (n, hidden_size), normalised -> float32 (n, hidden_size); `cache` is the earlier layer's."""
        config = self._config
        queries = self._queries(x).reshape(len(x), config.num_heads, config.head_dim)
        queries = _core.rms_norm(queries, self._norm, config.norm_eps, self._pool)
        if angles is not None:
            _core.rotate(queries, angles.cosines, angles.sines, self._pool)
        return self._output(cache.look(queries, self._mix))

    def _mix(self, queries: Floats, positions: Positions) -> Floats:
        keys, values, window, scales, earlier = positions[1:]
        return _core.attention(queries, keys, values, window, self._pool, scales, earlier)
