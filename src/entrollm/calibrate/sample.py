"""Text that a model writes itself: what it is calibrated on when nothing better is at hand."""

from __future__ import annotations

import math
import os
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from entrollm import _core
from entrollm.calibrate.arithmetic import rms_norm
from entrollm.calibrate.backward import draw_labels
from entrollm.checkpoint import Checkpoint
from entrollm.engine.config import ModelConfig
from entrollm.engine.decoder import Layer
from entrollm.engine.linear import DenseWeights
from entrollm.engine.rope import RopeTables
from entrollm.engine.weights import Floats, load_embedding, load_linear, load_tensor
from entrollm.errors import EntroLLMError

_EMBEDDING = "model.embed_tokens.weight"
# Keys and values of the sequences that are written side by side.
_CACHE_BYTES = 1 << 30


def sample_windows(
    checkpoint: Checkpoint,
    config: ModelConfig,
    shape: tuple[int, int],
    seed: int = 0,
    progress: Callable[[float, float], None] | None = None,
) -> NDArray[np.int64]:
    """Let a model write at temperature 1, from its start token (any token where it has none).

    Memory: the whole model in float32, and up to 1 GiB of keys and values.

    Args:
        checkpoint: the model.
        config: its configuration.
        shape: (windows, tokens) wanted; the start token is not among them.
        seed: of the random choices.
        progress: called with the tokens done and in all.
    Returns:
        int64, of that shape.
    Raises:
        EntroLLMError: the model's logits are not finite, or it does not fit this machine's memory.
        FormatError: a tensor is missing or has the wrong shape.
    """
    _check_memory(checkpoint)
    writer = _Writer(config, DenseWeights(checkpoint))
    generator = np.random.default_rng(seed)
    windows, tokens = shape
    batch = min(windows, max(1, _CACHE_BYTES // max(1, writer.cache_bytes(tokens))))
    written = np.empty(shape, np.int64)
    for begin in range(0, windows, batch):
        part = written[begin : begin + batch]
        caches = writer.caches(len(part), tokens)
        if config.bos_token_id is None:
            ids = generator.integers(0, config.vocab_size, len(part))
        else:
            ids = np.full(len(part), config.bos_token_id)
        for position in range(tokens):
            ids = _draw(writer.logits(ids, position, caches), generator)
            part[:, position] = ids
            if progress is not None:
                progress(begin * tokens + (position + 1) * len(part), windows * tokens)
    return written


def _check_memory(checkpoint: Checkpoint) -> None:
    needed = sum(4 * math.prod(info.shape) for info in checkpoint.tensors.values()) + _CACHE_BYTES
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > memory:
        raise EntroLLMError(
            f"text that {checkpoint.path} writes itself needs {needed / 1e9:.1f} GB of memory, and this machine has "
            f"{memory / 1e9:.1f} GB; calibrate on a text alone, with --sampled 0"
        )


class _Writer:
    """A dense model that reads one token of several sequences at a time."""

    def __init__(self, config: ModelConfig, weights: DenseWeights) -> None:
        self._config = config
        table = (config.vocab_size, config.hidden_size)
        self._embedding = load_embedding(weights, _EMBEDDING, table)
        self._layers = [Layer(config, weights, index) for index in range(config.num_layers)]
        self._norm = load_tensor(weights, "model.norm.weight", (config.hidden_size,))
        tied = config.tied_embeddings or "lm_head.weight" not in weights
        self._head = load_linear(weights, {_EMBEDDING if tied else "lm_head.weight": table})
        self._rope = RopeTables(config.rope)

    def cache_bytes(self, tokens: int) -> int:
        """What the keys and values of one sequence take."""
        config = self._config
        return 8 * config.num_layers * config.num_kv_heads * config.head_dim * tokens

    def caches(self, sequences: int, tokens: int) -> list[_SequencesCache]:
        """Empty caches of all layers."""
        config = self._config
        shape = (sequences, config.num_kv_heads, tokens, config.head_dim)
        return [_SequencesCache(shape, window) for window in config.windows]

    def logits(self, ids: NDArray[np.int64], position: int, caches: list[_SequencesCache]) -> Floats:
        """float32 (sequences, vocab_size) after the tokens `ids`, one of each sequence, at `position`."""
        is_long = self._config.rope.is_long(caches[0].capacity)
        cosines, sines = self._rope.rows(position, 1, is_long)
        x = self._embedding.rows(ids)
        for layer, cache in zip(self._layers, caches, strict=True):
            x = layer(x, np.repeat(cosines, len(ids), 0), np.repeat(sines, len(ids), 0), cache)
        return self._head(rms_norm(x, self._norm, self._config.norm_eps))


class _SequencesCache:
    """Keys and values of one layer for sequences of equal length; see `engine.cache.Attention`."""

    def __init__(self, shape: tuple[int, int, int, int], window: int | None) -> None:
        sequences, kv_heads, tokens, head_dim = shape
        self._keys = np.empty((sequences, kv_heads, head_dim, tokens), np.float32)
        self._values = np.empty(shape, np.float32)
        self._window = window
        self._held = 0

    @property
    def capacity(self) -> int:
        return self._values.shape[2]

    def attend(self, queries: Floats, keys: Floats, values: Floats, pool: _core.ThreadPool) -> Floats:
        """Add one token to each of n sequences; each query sees its own sequence."""
        sequences, heads, head_dim = queries.shape
        self._keys[..., self._held] = keys
        self._values[:, :, self._held] = values
        self._held += 1
        first = 0 if self._window is None else max(0, self._held - self._window)
        seen = slice(first, self._held)
        grouped: Floats = np.multiply(queries, np.float32(head_dim**-0.5))
        grouped = grouped.reshape(sequences, self._keys.shape[1], -1, head_dim)
        scores: Floats = grouped @ self._keys[..., seen]
        scores -= scores.max(axis=-1, keepdims=True)
        np.exp(scores, out=scores)
        scores /= scores.sum(axis=-1, keepdims=True)
        mixed: Floats = (scores @ self._values[:, :, seen]).reshape(sequences, heads * head_dim)
        return mixed


def _draw(logits: Floats, generator: np.random.Generator) -> NDArray[np.int64]:
    """One token from each row's distribution."""
    if not np.isfinite(logits.sum(dtype=np.float64)):
        raise EntroLLMError("the model's logits are not finite; its weights may be damaged")
    _, drawn = draw_labels(logits, generator)
    return drawn
