"""Attention whose keys and values are projections of one short vector for each token (MLA).

The cache holds these vectors. Scores and mixed values can be computed from them in two ways: *expanded*, by projecting
the vectors of all tokens to keys and values; or *absorbed*, by projecting each query to the space of the vectors, and
what is mixed of them back to values. A few queries over many tokens take less work absorbed, a prompt takes less
expanded.
"""

from __future__ import annotations

import numpy as np

from entrollm import _core
from entrollm.engine.arithmetic import plain_attention, rotate_neighbours
from entrollm.engine.attention import Angles
from entrollm.engine.layer_cache import Attention, Positions
from entrollm.engine.projection import Projection
from entrollm.engine.weights import Embedding, Floats, Weights, load_embedding, load_tensor
from entrollm.models.config import LatentAttention, ModelConfig

# So few queries are always absorbed: the tokens of a guess, which are no more, take the formula of single tokens.
_FEW_QUERIES = 16
# The norms of the vectors have their own epsilon, whatever config.json says.
_EPS = 1e-6


class MultiHeadLatentAttention:
    """The attention of one layer.

    Raises:
        FormatError: a tensor is missing or has another shape.
    """

    def __init__(self, config: ModelConfig, weights: Weights, prefix: str, form: LatentAttention) -> None:
        place = f"{prefix}self_attn."
        hidden, heads = config.hidden_size, config.num_heads
        self._config, self._form, self._pool = config, form, weights.pool
        width = heads * (form.plain + form.rotated)
        self._query_norm: Floats | None = None
        if form.query_rank is None:
            self._queries = Projection(weights, {f"{place}q_proj": width}, hidden, False)
        else:
            self._short_queries = Projection(weights, {f"{place}q_a_proj": form.query_rank}, hidden, form.has_bias)
            self._query_norm = load_tensor(weights, f"{place}q_a_layernorm.weight", (form.query_rank,))
            self._queries = Projection(weights, {f"{place}q_b_proj": width}, form.query_rank, False)
        short = {f"{place}kv_a_proj_with_mqa": form.rank + form.rotated}
        self._short = Projection(weights, short, hidden, form.has_bias)
        self._norm = load_tensor(weights, f"{place}kv_a_layernorm.weight", (form.rank,))
        expanded = heads * (form.plain + form.value)
        self._expand = Projection(weights, {f"{place}kv_b_proj": expanded}, form.rank, False)
        self._rows: Embedding = load_embedding(weights, f"{place}kv_b_proj.weight", (expanded, form.rank))
        self._absorbed: tuple[Floats, Floats] | None = None
        self._output = Projection(weights, {f"{place}o_proj": hidden}, heads * form.value, form.has_bias)

    def __call__(self, x: Floats, angles: Angles | None, cache: Attention) -> Floats:
        """float32 (n, hidden_size), normalised -> float32 (n, hidden_size)."""
        form, n = self._form, len(x)
        if self._query_norm is not None:
            short = _core.rms_norm(self._short_queries(x), self._query_norm, _EPS, self._pool)
            queries = self._queries(short)
        else:
            queries = self._queries(x)
        queries = queries.reshape(n, self._config.num_heads, form.plain + form.rotated)
        short = self._short(x)
        vectors = _core.rms_norm(np.ascontiguousarray(short[:, : form.rank]), self._norm, _EPS, self._pool)
        keys = np.concatenate([vectors, short[:, form.rank :]], axis=1)[:, None]
        if angles is not None:
            self._rotate(queries[:, :, form.plain :], angles)
            self._rotate(keys[:, :, form.rank :], angles)
        queries *= np.float32(form.scale)
        if angles is not None and angles.query_factors is not None:
            queries *= angles.query_factors
        return self._output(cache.attend(queries, keys, keys[:, :, :0], self._mix))

    def _rotate(self, features: Floats, angles: Angles) -> None:
        if self._config.has_rotated_neighbours:
            rotate_neighbours(features, angles.cosines, angles.sines)
        else:
            rotated = np.ascontiguousarray(features)
            _core.rotate(rotated, angles.cosines, angles.sines, self._pool)
            features[...] = rotated

    def _mix(self, queries: Floats, positions: Positions) -> Floats:
        """See `Mix`; keys are (1, rank + rotated, length), and there are no values."""
        keys, _ = positions.floats()
        form, n, length, window = self._form, len(queries), keys.shape[2], positions.window
        if n <= _FEW_QUERIES:
            return self._mix_absorbed(queries, keys[0], window)
        by_token = length * form.rank * (form.plain + form.value)
        expanded = by_token + n * length * (form.plain + form.rotated + form.value)
        absorbed = n * form.rank * (form.plain + form.value) + n * length * (2 * form.rank + form.rotated)
        return (self._mix_absorbed if absorbed < expanded else self._mix_expanded)(queries, keys[0], window)

    def _mix_expanded(self, queries: Floats, vectors: Floats, window: int | None) -> Floats:
        form, (_, heads, _), length = self._form, queries.shape, vectors.shape[1]
        expanded = self._expand(np.ascontiguousarray(vectors[: form.rank].T)).reshape(length, heads, -1)
        keys = np.empty((heads, form.plain + form.rotated, length), dtype=np.float32)
        keys[:, : form.plain] = expanded[:, :, : form.plain].transpose(1, 2, 0)
        keys[:, form.plain :] = vectors[form.rank :]
        values = np.ascontiguousarray(expanded[:, :, form.plain :].transpose(1, 0, 2))
        return plain_attention(queries, keys, values, window)

    def _mix_absorbed(self, queries: Floats, vectors: Floats, window: int | None) -> Floats:
        form, (n, heads, _) = self._form, queries.shape
        if self._absorbed is None:
            # Products with parts of the transposed matrix need it decoded.
            rows = self._rows.rows(np.arange(self._rows.shape[0])).reshape(heads, form.plain + form.value, form.rank)
            to_values = np.ascontiguousarray(rows[:, form.plain :].transpose(0, 2, 1))
            self._absorbed = np.ascontiguousarray(rows[:, : form.plain]), to_values
        to_vectors, to_values = self._absorbed
        plain = np.ascontiguousarray(queries[:, :, : form.plain].transpose(1, 0, 2))
        queries = np.concatenate([(plain @ to_vectors).transpose(1, 0, 2), queries[:, :, form.plain :]], axis=2)
        mixed = plain_attention(queries, vectors[None], vectors[None, : form.rank].transpose(0, 2, 1), window)
        mixed = mixed.reshape(n, heads, form.rank).transpose(1, 0, 2) @ to_values
        return np.ascontiguousarray(mixed.transpose(1, 0, 2)).reshape(n, heads * form.value)
