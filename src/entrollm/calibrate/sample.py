"""Text that a model writes itself: what it is calibrated on when nothing better is at hand."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers.cache_utils import DynamicLayer

from entrollm.arrays import HOST, Device
from entrollm.calibrate.network import Network
from entrollm.calibrate.sums import draw_labels
from entrollm.calibrate.threads import QuickestThreads
from entrollm.checkpoint.model_folder import Checkpoint
from entrollm.errors import EntroLLMError, Message, Option, UnsupportedError
from entrollm.processes import share
from entrollm.torch.device import TorchDevice

# Keys and values of the sequences that are written side by side: so much at least.
_CACHE_BYTES = 1 << 30


def sample_windows(
    checkpoint: Checkpoint,
    shape: tuple[int, int],
    seed: int = 0,
    progress: Callable[[float, float], None] | None = None,
    device: Device = HOST,
) -> NDArray[np.int64]:
    """Let a model write at temperature 1, from its start token (any token where it has none).

    Memory: the whole model in float32, and keys and values: 1 GiB, or up to half of what is left on a GPU.

    Args:
        checkpoint: the model.
        shape: (windows, tokens) wanted; the start token is not among them.
        seed: of the random choices.
        progress: called with the tokens done and in all, of this process.
        device: what computes; processes that share it write a part of the windows each.
    Returns:
        int64, of that shape.
    Raises:
        EntroLLMError: the model's logits are not finite, or it does not fit the memory.
        FormatError: a tensor is missing or has the wrong shape.
        UnsupportedError: transformers does not know the model, or it writes no text.
    """
    cache_bytes = _check_memory(checkpoint, device)
    place = device if isinstance(device, TorchDevice) else TorchDevice("cpu")
    network = Network(checkpoint, place)
    model = network.model
    if not model.can_generate() or model.config.is_encoder_decoder:
        raise UnsupportedError(
            f"{checkpoint.path}: {type(model).__name__} does not write text",
            hint=Message("calibrate on a text alone, with {}", Option("sampled", 0)),
        )
    network.load_all()
    generator = np.random.default_rng(seed)
    windows, tokens = shape
    config = model.config.get_text_config()
    first = config.bos_token_id
    starts = generator.integers(0, config.vocab_size, windows) if first is None else np.full(windows, first)
    points = generator.random((tokens, windows))  # whichever process writes a window, its choices are the same
    own = share(np.arange(windows), device.group)
    quickest = QuickestThreads()
    size = max(1, cache_bytes // _sequence_bytes(config, tokens))
    written = np.zeros(shape, np.int64)
    for begin in range(0, len(own), size):
        part = own[begin : begin + size]
        ids = starts[part]
        cache = None
        for position in range(tokens):
            with quickest.step():
                logits, cache = _predict(model, torch.from_numpy(ids).to(place.place), cache)
            if position == 0:
                _give_room(cache, tokens)
            if not torch.isfinite(logits.sum()):
                raise EntroLLMError("the model's logits are not finite; its weights may be damaged")
            ids = place.take(draw_labels(logits, points[position, part])[1])
            written[part, position] = ids
            if progress is not None:
                progress(begin * tokens + (position + 1) * len(part), len(own) * tokens)
    device.group.sum(written)
    return written


def _predict(model: Any, ids: Tensor, cache: Any) -> tuple[Tensor, Any]:
    """float32 (sequences, vocab_size) after the next tokens `ids`, one of each sequence, and the keys and values."""
    with torch.no_grad():
        outputs = model(input_ids=ids[:, None], use_cache=True, **{_cache_name(model): cache})
    cache = outputs.get("past_key_values") if outputs.get("cache") is None else outputs["cache"]
    if cache is None:
        raise UnsupportedError(
            f"{type(model).__name__} keeps no keys and values, so that it is too slow a writer",
            hint=Message("calibrate on a text alone, with {}", Option("sampled", 0)),
        )
    return outputs["logits"][:, -1].float(), cache


class _RoomyLayer(DynamicLayer):  # type: ignore[no-untyped-call]
    """Keys and values with room for all tokens, so that a new one is written beside the others, which stay.

    Args:
        keys, values: of the first tokens, (sequences, heads, tokens, features).
        tokens: as many as will come.
    """

    def __init__(self, keys: Tensor, values: Tensor, tokens: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.lazy_initialization(keys, values)
        self._room = [held.new_empty(*held.shape[:-2], tokens, held.shape[-1]) for held in (keys, values)]
        self.update(keys, values)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Add keys and values, and return all."""
        begin = self.get_seq_length()
        end = begin + key_states.shape[-2]
        keys, values = self._room
        keys[..., begin:end, :], values[..., begin:end, :] = key_states, value_states
        self.keys, self.values = keys[..., :end, :], values[..., :end, :]
        return self.keys, self.values


def _give_room(cache: Any, tokens: int) -> None:
    """Replace the layers of a cache that would be copied for every token."""
    for index, layer in enumerate(getattr(cache, "layers", ())):
        if type(layer) is DynamicLayer and layer.keys is not None and layer.values is not None:
            cache.layers[index] = _RoomyLayer(layer.keys, layer.values, tokens)


def _cache_name(model: Any) -> str:
    """The argument for keys and values, which transformers has renamed."""
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"


def _sequence_bytes(config: Any, tokens: int) -> int:
    """What the keys and values of one sequence take, at most."""
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return int(8 * config.num_hidden_layers * heads * head_dim * tokens)


def _check_memory(checkpoint: Checkpoint, device: Device) -> int:
    """Bytes that keys and values may take, beside the model."""
    held = 4 * sum(math.prod(info.shape) for info in checkpoint.tensors.values())
    memory = device.memory()
    if held + _CACHE_BYTES > memory:
        raise EntroLLMError(
            f"text that {checkpoint.path} writes itself needs {(held + _CACHE_BYTES) / 1e9:.1f} GB of memory, and "
            f"{device.name} has {memory / 1e9:.1f} GB",
            hint=Message("calibrate on a text alone, with {}", Option("sampled", 0)),
        )
    return max(_CACHE_BYTES, int(device.spare * (memory - held)))
