"""Windows of text run forward, a layer at a time: by the engine, or on another device."""

from __future__ import annotations

from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from entrollm.arrays import HOST, Array, Device, double, functions
from entrollm.calibrate.layer import (
    LayerWeights,
    See,
    Tensors,
    WindowAttention,
    causal_mask,
    rotation,
)
from entrollm.checkpoint.model_folder import Checkpoint
from entrollm.checkpoint.names import EMBEDDING
from entrollm.engine.layers import LayerWalk
from entrollm.engine.linear import DenseWeights
from entrollm.engine.weights import Embedding, Floats, Linear
from entrollm.models.config import ModelConfig

# Activations of so many tokens wait for one product, which costs less than many small ones.
_TOKENS_PER_PRODUCT = 4096


class Forward(Protocol):
    """The hidden states of windows between two layers.

    Attributes:
        hidden: float32 (tokens, hidden_size) of each window.
    """

    hidden: list[Array]

    def step(self, index: int, see: See) -> None:
        """Run layer `index`, which is the next one, on all windows.

        Raises:
            FormatError: a tensor of the layer is missing or has the wrong shape.
        """


def start(checkpoint: Checkpoint, config: ModelConfig, windows: NDArray[np.int64], device: Device) -> Forward:
    """Embed windows of token ids, shape (windows, tokens)."""
    if device is HOST:
        return _EngineForward(checkpoint, config, windows)
    return _DeviceForward(checkpoint, config, windows, device)


class Moments:
    """The sum of x x^T in float64 over rows x."""

    def __init__(self) -> None:
        self._waiting: list[Array] = []
        self._tokens = 0
        self._sum: Array | None = None

    def add(self, x: Array) -> None:
        """Add float32 (n, columns), which must not change any more."""
        self._waiting.append(x)
        self._tokens += len(x)
        if self._tokens >= _TOKENS_PER_PRODUCT:
            self._flush()

    def total(self) -> Array:
        """The sum, float64 (columns, columns), of at least one row."""
        self._flush()
        return self._sum

    def _flush(self) -> None:
        if not self._waiting:
            return
        x = functions(self._waiting[0]).concatenate(self._waiting)
        self._waiting.clear()
        self._tokens = 0
        product = x.T @ x
        if self._sum is None:
            self._sum = double(product)
        else:
            self._sum += product


class _EngineForward:
    def __init__(self, checkpoint: Checkpoint, config: ModelConfig, windows: NDArray[np.int64]) -> None:
        self._checkpoint = checkpoint
        self._walk = LayerWalk(config, DenseWeights(checkpoint), windows)
        self.hidden: list[Array] = self._walk.hidden

    def step(self, index: int, see: See) -> None:
        self._walk.step(index, _Watched(self._checkpoint, see))


class _DeviceForward:
    def __init__(self, checkpoint: Checkpoint, config: ModelConfig, windows: NDArray[np.int64], device: Device) -> None:
        self._config = config
        self._device = device
        self._tensors = Tensors(checkpoint, device)
        self._tables = rotation(config, windows.shape[1], device)
        embedding = self._tensors.read(EMBEDDING, (config.vocab_size, config.hidden_size))
        self.hidden: list[Array] = [embedding[ids] for ids in windows]

    def step(self, index: int, see: See) -> None:
        layer = LayerWeights(self._config, self._tensors.read, self._tensors.read, index)
        mask = self._device.put(causal_mask(len(self.hidden[0]), layer.window))
        attention = WindowAttention(layer, self._tables, mask)
        for number, x in enumerate(self.hidden):
            self.hidden[number] = layer.forward(x, attention, see)


class _Watched:
    """Weights that tell what their matrices multiply."""

    def __init__(self, checkpoint: Checkpoint, see: See) -> None:
        self._weights = DenseWeights(checkpoint)
        self._see = see
        self.pool = self._weights.pool

    def __contains__(self, name: str, /) -> bool:
        return name in self._weights

    def linear(self, *names: str) -> Linear:
        """The matrices, watched."""
        return _WatchedLinear(self._weights.linear(*names), names, self._see)

    def embedding(self, name: str, /) -> Embedding:
        """The matrix `name`; look-ups are not told of."""
        return self._weights.embedding(name)

    def tensor(self, name: str, /) -> Floats:
        """The tensor `name` in float32."""
        return self._weights.tensor(name)


class _WatchedLinear:
    def __init__(self, inner: Linear, names: tuple[str, ...], see: See) -> None:
        self._inner = inner
        self._names = names
        self._see = see
        self.shape = inner.shape

    def __call__(self, x: Floats, /) -> Floats:
        self._see(self._names, x.copy())
        return self._inner(x)
