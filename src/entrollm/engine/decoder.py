"""The decoder-only transformer that every supported architecture is an instance of."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from entrollm import _core
from entrollm.checkpoint.names import EMBEDDING, output_head
from entrollm.engine.batch import Segment, SequencesAttention, SequenceStep, passes
from entrollm.engine.cache import Attention, Cache
from entrollm.engine.weights import Floats, Ids, Weights, load_embedding, load_linear, load_tensor
from entrollm.models.config import ModelConfig
from entrollm.models.rope import RopeTables

# Prompt tokens per pass through the layers: bounds the activations without re-reading the weights too often.
_TOKENS_PER_PASS = 512


class Decoder:
    """A model's layers over its weights.

    Raises:
        FormatError: a tensor is missing or has another shape than config.json asks for.
    """

    def __init__(self, config: ModelConfig, weights: Weights) -> None:
        self.config = config
        table = (config.vocab_size, config.hidden_size)
        self._embedding = load_embedding(weights, EMBEDDING, table)
        self._layers = [Layer(config, weights, index) for index in range(config.num_layers)]
        self._norm = load_tensor(weights, "model.norm.weight", (config.hidden_size,))
        self._head = load_linear(weights, {output_head(weights, is_tied=config.tied_embeddings): table})
        self._tables = RopeTables(config.rope)
        self._pool = weights.pool

    def new_cache(self) -> Cache:
        """An empty cache for one sequence."""
        return Cache(self.config)

    def forward(self, ids: Ids, cache: Cache, *, last_only: bool = False) -> Floats:
        """Run the model on the tokens that follow those in the cache, and add them to it.

        Args:
            ids: int64 (n,), n >= 1, each in [0, vocab_size).
            cache: the tokens before; left in an undefined state if this call is interrupted, until its reset().
            last_only: compute the logits of the last position alone.
        Returns:
            float32 (n, vocab_size), or (1, vocab_size) with last_only.
        """
        wanted = 1 if last_only else len(ids)
        ids = self._begin(ids, cache)
        hidden = [x for x, _ in self._run([Segment(0, ids, cache)])]
        return self._logits((hidden[0] if len(hidden) == 1 else np.concatenate(hidden))[-wanted:])

    def step(self, steps: Sequence[SequenceStep]) -> Floats:
        """Run the model on the next tokens of several sequences at once, and add them to their caches.

        All sequences go through each product together; attention is per sequence. Coded matrices give each sequence
        the same bits as on its own.

        Args:
            steps: at least one, each with a cache of its own; the caches are left in an undefined state if this call
                is interrupted, until their reset().
        Returns:
            float32 (n, vocab_size): the logits after the last token of each step with needs_logits, in their order.
        """
        segments = [Segment(i, self._begin(step.ids, step.cache), step.cache) for i, step in enumerate(steps)]
        last: dict[int, Floats] = {}
        for x, done in self._run(segments):
            row = 0
            for segment in done:
                row += len(segment.ids)
                last[segment.index] = x[row - 1 : row]
        wanted = [last[index] for index, step in enumerate(steps) if step.needs_logits]
        if not wanted:
            return np.empty((0, self.config.vocab_size), dtype=np.float32)
        return self._logits(np.concatenate(wanted))

    def _begin(self, ids: Ids, cache: Cache) -> Ids:
        """The tokens to run: `ids`, or the sequence from its start where its rotations change."""
        is_long = self.config.rope.is_long(cache.length + len(ids))
        if is_long != cache.is_long and cache.length:
            # Every hidden state depends on the frequencies, so crossing longrope's limit starts the sequence over.
            ids = np.concatenate([np.array(cache.ids, dtype=np.int64), ids])
            cache.reset()
        cache.is_long = is_long
        return ids

    def _run(self, segments: Sequence[Segment]) -> Iterator[tuple[Floats, list[Segment]]]:
        """The hidden states of all tokens, in passes of bounded size, each with what it consists of."""
        for part in passes(segments, _TOKENS_PER_PASS):
            yield self._run_layers(part), part

    def _run_layers(self, segments: Sequence[Segment]) -> Floats:
        tables = [
            self._tables.rows(segment.cache.length, len(segment.ids), segment.cache.is_long) for segment in segments
        ]
        for segment in segments:
            segment.cache.ids.extend(segment.ids.tolist())
        only = len(segments) == 1
        cosines, sines = tables[0] if only else (np.concatenate(rows) for rows in zip(*tables, strict=True))
        x = self._embedding.rows(segments[0].ids if only else np.concatenate([each.ids for each in segments]))
        for index, layer in enumerate(self._layers):
            x = layer(
                x, cosines, sines, segments[0].cache.layers[index] if only else SequencesAttention(segments, index)
            )
        return x

    def _logits(self, hidden: Floats) -> Floats:
        return self._head(_core.rms_norm(hidden, self._norm, self.config.norm_eps, self._pool))


class Layer:
    """Attention and MLP, each behind a norm and added to the residual stream."""

    def __init__(self, config: ModelConfig, weights: Weights, index: int) -> None:
        prefix = f"model.layers.{index}."
        hidden, inner = config.hidden_size, config.intermediate_size
        heads, kv_heads, head_dim = config.num_heads, config.num_kv_heads, config.head_dim
        self._config = config
        self._pool = weights.pool
        self._attention_norm = load_tensor(weights, f"{prefix}input_layernorm.weight", (hidden,))
        self._mlp_norm = load_tensor(weights, f"{prefix}post_attention_layernorm.weight", (hidden,))
        kv_dim = kv_heads * head_dim
        qkv = {"q_proj": heads * head_dim, "k_proj": kv_dim, "v_proj": kv_dim}
        gate_up = {"gate_proj": inner, "up_proj": inner}
        if config.fused:
            qkv, gate_up = {"qkv_proj": sum(qkv.values())}, {"gate_up_proj": 2 * inner}
        self._qkv = _Projection(weights, f"{prefix}self_attn.", qkv, hidden, config.qkv_bias)
        self._output = _Projection(
            weights, f"{prefix}self_attn.", {"o_proj": hidden}, heads * head_dim, config.output_bias
        )
        self._gate_up = _Projection(weights, f"{prefix}mlp.", gate_up, hidden, config.mlp_bias)
        self._down = _Projection(weights, f"{prefix}mlp.", {"down_proj": hidden}, inner, config.mlp_bias)
        self._qk_norm: Floats | None = None
        if config.qk_norm:
            q_norm = load_tensor(weights, f"{prefix}self_attn.q_norm.weight", (head_dim,))
            k_norm = load_tensor(weights, f"{prefix}self_attn.k_norm.weight", (head_dim,))
            self._qk_norm = np.stack([q_norm] * heads + [k_norm] * kv_heads)

    def __call__(self, x: Floats, cosines: Floats, sines: Floats, cache: Attention) -> Floats:
        """float32 (n, hidden_size) -> float32 (n, hidden_size)."""
        x = x + self._attend(self._norm(x, self._attention_norm), cosines, sines, cache)
        x += self._down(_core.swiglu(self._gate_up(self._norm(x, self._mlp_norm)), self._pool))
        return x

    def _norm(self, x: Floats, weight: Floats) -> Floats:
        return _core.rms_norm(x, weight, self._config.norm_eps, self._pool)

    def _attend(self, x: Floats, cosines: Floats, sines: Floats, cache: Attention) -> Floats:
        config = self._config
        heads, rotated_heads = config.num_heads, config.num_heads + config.num_kv_heads
        qkv = self._qkv(x).reshape(len(x), -1, config.head_dim)
        qk = qkv[:, :rotated_heads]
        if self._qk_norm is not None:
            qk = self._norm(np.ascontiguousarray(qk), self._qk_norm)
        _core.rotate(qk, cosines, sines, self._pool)
        return self._output(cache.attend(qk[:, :heads], qk[:, heads:], qkv[:, rotated_heads:], self._pool))


class _Projection:
    """One or more linear layers on the same input, their outputs side by side.

    Args:
        weights: the model's tensors.
        prefix: what the names start with.
        outputs: out_features of each part, by name.
        in_features: of every part.
        bias: whether every part has one.
    """

    def __init__(self, weights: Weights, prefix: str, outputs: dict[str, int], in_features: int, bias: bool) -> None:
        shapes = {f"{prefix}{name}.weight": (size, in_features) for name, size in outputs.items()}
        self._linear = load_linear(weights, shapes)
        self._bias: Floats | None = None
        if bias:
            parts = [load_tensor(weights, f"{prefix}{name}.bias", (size,)) for name, size in outputs.items()]
            self._bias = np.concatenate(parts)

    def __call__(self, x: Floats) -> Floats:
        """float32 (n, in_features) -> float32 (n, sum of out_features)."""
        y = self._linear(x)
        if self._bias is not None:
            y += self._bias
        return y
