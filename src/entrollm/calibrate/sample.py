"""Text that a model writes itself: what it is calibrated on when nothing better is at hand."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from entrollm.arrays import HOST, Array, Device, single
from entrollm.calibrate.arithmetic import rms_norm, softmax
from entrollm.calibrate.backward import draw_labels
from entrollm.calibrate.layer import NORM, LayerWeights, Tensors, rotation
from entrollm.checkpoint.model_folder import Checkpoint
from entrollm.checkpoint.names import EMBEDDING, output_head
from entrollm.errors import EntroLLMError, Message, Option
from entrollm.models.config import ModelConfig

# Keys and values of the sequences that are written side by side: so much at least.
_CACHE_BYTES = 1 << 30


def sample_windows(
    checkpoint: Checkpoint,
    config: ModelConfig,
    shape: tuple[int, int],
    seed: int = 0,
    progress: Callable[[float, float], None] | None = None,
    device: Device = HOST,
) -> NDArray[np.int64]:
    """Let a model write at temperature 1, from its start token (any token where it has none).

    Memory: the whole model, in float32 on the host and in its own type elsewhere, and keys and values: 1 GiB, or up to
    half of what is left on a device of its own.

    Args:
        checkpoint: the model.
        config: its configuration.
        shape: (windows, tokens) wanted; the start token is not among them.
        seed: of the random choices.
        progress: called with the tokens done and in all.
        device: what computes.
    Returns:
        int64, of that shape.
    Raises:
        EntroLLMError: the model's logits are not finite, or it does not fit the memory.
        FormatError: a tensor is missing or has the wrong shape.
    """
    tensors = Tensors(checkpoint, device)
    cache_bytes = _check_memory(checkpoint, tensors.held_bytes(), device)
    writer = _Writer(config, tensors, device)
    generator = np.random.default_rng(seed)
    windows, tokens = shape
    batch = min(windows, max(1, cache_bytes // _sequence_bytes(config, tokens)))
    written = np.empty(shape, np.int64)
    for begin in range(0, windows, batch):
        part = written[begin : begin + batch]
        mixers = writer.mixers(len(part), tokens)
        if config.bos_token_id is None:
            ids = generator.integers(0, config.vocab_size, len(part))
        else:
            ids = np.full(len(part), config.bos_token_id)
        for position in range(tokens):
            logits = writer.logits(ids, mixers)
            if not np.isfinite(float(logits.sum())):
                raise EntroLLMError("the model's logits are not finite; its weights may be damaged")
            ids = device.take(draw_labels(logits, generator)[1])
            part[:, position] = ids
            if progress is not None:
                progress(begin * tokens + (position + 1) * len(part), windows * tokens)
    return written


def _sequence_bytes(config: ModelConfig, tokens: int) -> int:
    """What the keys and values of one sequence take."""
    return 8 * config.num_layers * config.num_kv_heads * config.head_dim * tokens


def _check_memory(checkpoint: Checkpoint, held: int, device: Device) -> int:
    """Bytes that keys and values may take, beside a model of `held` bytes."""
    memory = device.memory()
    if held + _CACHE_BYTES > memory:
        raise EntroLLMError(
            f"text that {checkpoint.path} writes itself needs {(held + _CACHE_BYTES) / 1e9:.1f} GB of memory, and "
            f"{device.name} has {memory / 1e9:.1f} GB",
            hint=Message("calibrate on a text alone, with {}", Option("sampled", 0)),
        )
    return max(_CACHE_BYTES, int(device.spare * (memory - held)))


class _Writer:
    """A dense model that reads one token of several sequences at a time."""

    def __init__(self, config: ModelConfig, tensors: Tensors, device: Device) -> None:
        self._config = config
        self._device = device
        table = (config.vocab_size, config.hidden_size)
        self._embedding = tensors.hold(EMBEDDING, table)
        self._layers = [LayerWeights(config, tensors.hold, tensors.read, index) for index in range(config.num_layers)]
        self._norm = tensors.read(NORM, (config.hidden_size,))
        head = output_head(tensors, is_tied=config.tied_embeddings)
        self._head = self._embedding if head == EMBEDDING else tensors.hold(head, table)

    def mixers(self, sequences: int, tokens: int) -> list[_SequencesAttention]:
        """The attention of all layers, no token read yet."""
        tables = rotation(self._config, tokens, self._device)
        return [_SequencesAttention(layer, tables, sequences, self._device) for layer in self._layers]

    def logits(self, ids: NDArray[np.int64], mixers: list[_SequencesAttention]) -> Array:
        """float32 (sequences, vocab_size) after the next tokens `ids`, one of each sequence."""
        x = single(self._embedding[ids])
        for layer, mix in zip(self._layers, mixers, strict=True):
            x = layer.forward(x, mix)
        return rms_norm(x, self._norm, self._config.norm_eps) @ single(self._head).T


class _SequencesAttention:
    """Attention of one layer, with keys and values, for sequences of equal length that read a token at a time."""

    def __init__(self, layer: LayerWeights, tables: tuple[Array, Array], sequences: int, device: Device) -> None:
        config, tokens = layer.config, len(tables[0])
        self._layer = layer
        self._tables = tables
        self._keys = device.zeros(sequences, config.num_kv_heads, config.head_dim, tokens)
        self._values = device.zeros(sequences, config.num_kv_heads, tokens, config.head_dim)
        self._held = 0

    def __call__(self, qkv: Array) -> Array:
        """float32 (sequences, q, k and v side by side) -> float32 (sequences, heads * head_dim)."""
        layer, held = self._layer, self._held
        # Tables of one position, for the same position of every sequence.
        cosines, sines = (table[held : held + 1] for table in self._tables)
        queries, keys, values = layer.heads(qkv, (cosines, sines))
        self._keys[..., held] = keys
        self._values[:, :, held] = values
        self._held += 1
        first = 0 if layer.window is None else max(0, self._held - layer.window)
        queries = queries.reshape(len(qkv), layer.config.num_kv_heads, -1, layer.config.head_dim)
        scores = (queries * layer.config.head_dim**-0.5) @ self._keys[..., first : self._held]
        return (softmax(scores) @ self._values[:, :, first : self._held]).reshape(len(qkv), -1)
