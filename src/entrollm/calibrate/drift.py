"""What quantized layers do to the inputs of those after them, and how a matrix makes up for it before it is rounded.

With x the inputs of a matrix W in the original model and x' those that the layers quantized so far give it, the outputs
that W' gives of x' are closest to those that W gave of x for W' = W E[x x'^T] E[x' x'^T]^-1 (Qronos, arXiv 2505.11695;
WaterSIC, arXiv 2603.04956). A matrix that writes to the residual stream can make up for the error of what it adds to as
well. All of that would fit the calibration text too closely, so the correction is a part of it, and drawn to zero by a
ridge.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
from numpy.typing import NDArray

from entrollm.arrays import Array, Device, double, functions, single
from entrollm.calibrate.arithmetic import rms_norm, swiglu
from entrollm.calibrate.layer import (
    NORM,
    LayerWeights,
    Part,
    Tensors,
    WindowAttention,
    causal_mask,
    rotation,
)
from entrollm.checkpoint.model_folder import Checkpoint
from entrollm.checkpoint.names import EMBEDDING, HEAD
from entrollm.errors import EntroLLMError
from entrollm.models.config import ModelConfig

# The part of the correction that is applied, and the ridge over the mean square of an input.
_TRUST = 0.6
_RIDGE = 0.2
# Inputs of so many tokens share a product.
_TOKENS_PER_PRODUCT = 4096

Pair = tuple[Array, Array]
"""What a window has in the original model, and in that whose matrices so far are quantized."""


class DriftWalk:
    """What the quantized matrices of a model do to the inputs of those after them; see `Drift`.

    Memory: 8 bytes x tokens x (hidden_size + the widest input of a matrix), and one layer in float32.

    Args:
        checkpoint: the model.
        config: its configuration.
        windows: token ids, shape (windows, tokens).
        device: what computes.
    """

    def __init__(self, checkpoint: Checkpoint, config: ModelConfig, windows: NDArray[np.int64], device: Device) -> None:
        self._models = _Models(checkpoint, config, windows, device)
        self._parts = self._models.walk()
        self._corrections: dict[str, Array] = {}

    def correction(self, name: str) -> Array | None:
        """What is added to a matrix before it is rounded: float32, its shape; None for nothing.

        Raises:
            EntroLLMError: activations of the quantized model are not finite.
            FormatError: a tensor is missing or has the wrong shape.
            ValueError: matrices are not asked for in the order of a forward pass.
        """
        if name == EMBEDDING:
            return None
        if name not in self._corrections:
            found = next((step for step in self._parts if name in step[0].names), None)
            if found is None:
                raise ValueError(f"{name}: not a matrix of a layer, or matrices after it were asked for before")
            self._corrections = _solve(found[0], *self._models.products(found[1]))
        return self._corrections[name]

    def record(self, name: str, weights: Callable[[], NDArray[np.float32]]) -> None:
        """Take note of what a matrix has become, to be read when the walk passes it; else it counts as unchanged."""
        self._models.record(name, weights)


def _solve(part: Part, moments: Array, drift: Array, missing: Array) -> dict[str, Array]:
    """The corrections of matrices on one input; the arguments after them are those of `_Models.products`."""
    xp = functions(moments)
    if not (xp.isfinite(moments).all() and xp.isfinite(drift).all()):
        raise EntroLLMError(f"{part.names[0]}: its inputs in the quantized model are not finite")
    places = np.arange(len(moments))
    mean = float(xp.trace(moments)) / len(moments)
    # Where all inputs are dead, so is the drift.
    moments[places, places] += _RIDGE * mean if mean > 0 else 1.0
    wanted = double(part.weight) @ drift + missing
    whole = single(_TRUST * xp.linalg.solve(moments, wanted.T).T)
    ends = np.cumsum(part.rows)
    return {name: whole[end - rows : end] for name, rows, end in zip(part.names, part.rows, ends, strict=True)}


class _Models:
    """A model, and beside it what its matrices have become, on their way through windows of text."""

    def __init__(self, checkpoint: Checkpoint, config: ModelConfig, windows: NDArray[np.int64], device: Device) -> None:
        self._config = config
        self._windows = windows
        self._device = device
        self._tensors = Tensors(checkpoint, device)
        self._recorded: dict[str, Callable[[], NDArray[np.float32]]] = {}
        self._hidden: list[Pair] = []
        self._inputs: list[Pair] = []

    def record(self, name: str, weights: Callable[[], NDArray[np.float32]]) -> None:
        """Take note of what a matrix has become, before the walk goes on."""
        self._recorded[name] = weights

    def walk(self) -> Iterator[tuple[Part, bool]]:
        """The matrices on one input after another, once both models have got there, and whether they write to the
        residual stream."""
        config, eps = self._config, self._config.norm_eps
        tables = rotation(config, self._windows.shape[1], self._device)
        self._embed()
        for index in range(config.num_layers):
            layer = LayerWeights(config, self._tensors.read, self._tensors.read, index)
            mask = self._device.put(causal_mask(self._windows.shape[1], layer.window))
            attention = WindowAttention(layer, tables, mask)
            self._norm(layer.attention_norm, eps)
            yield layer.qkv, False
            self._multiply(layer.qkv, attention)
            yield layer.output, True
            self._add(layer.output)
            self._norm(layer.mlp_norm, eps)
            yield layer.gate_up, False
            self._multiply(layer.gate_up, swiglu)
            yield layer.down, True
            self._add(layer.down)
        if HEAD in self._tensors:
            shape = (config.vocab_size, config.hidden_size)
            self._norm(self._tensors.read(NORM, (config.hidden_size,)), eps)
            yield Part((HEAD,), shape[:1], self._tensors.read(HEAD, shape), 0.0), False

    def _embed(self) -> None:
        embedding = self._tensors.read(EMBEDDING, (self._config.vocab_size, self._config.hidden_size))
        quantized = self._became(EMBEDDING, embedding)
        self._hidden = [(embedding[ids], quantized[ids]) for ids in self._windows]

    def _norm(self, weight: Array, eps: float) -> None:
        self._inputs = [(rms_norm(x, weight, eps), rms_norm(y, weight, eps)) for x, y in self._hidden]

    def _multiply(self, part: Part, then: Callable[[Array], Array]) -> None:
        quantized = self._quantized(part)
        for number, (x, y) in enumerate(self._inputs):
            self._inputs[number] = then(part(x)), then(quantized(y))

    def _add(self, part: Part) -> None:
        quantized = self._quantized(part)
        for number, (x, y) in enumerate(self._inputs):
            original, drifted = self._hidden[number]
            self._hidden[number] = original + part(x), drifted + quantized(y)
        self._inputs.clear()

    def _quantized(self, part: Part) -> Part:
        """The matrices as they were recorded."""
        begin, rows = 0, []
        for name, count in zip(part.names, part.rows, strict=True):
            rows.append(self._became(name, part.weight[begin : begin + count]))
            begin += count
        return Part(part.names, part.rows, functions(rows[0]).concatenate(rows), part.bias)

    def _became(self, name: str, original: Array) -> Array:
        weights = self._recorded.pop(name, None)
        return original if weights is None else self._device.put(weights())

    def products(self, is_stream: bool) -> tuple[Array, Array, Array]:
        """Sums in float64 over all tokens: x' x'^T; (x - x') x'^T; (h - h') x'^T with h the stream, or 0."""
        moments = drift = missing = 0.0
        step = max(1, _TOKENS_PER_PRODUCT // self._windows.shape[1])
        for begin in range(0, len(self._inputs), step):
            original, quantized = _joined(self._inputs[begin : begin + step])
            moments = moments + double(quantized.T @ quantized)
            drift = drift + double((original - quantized).T @ quantized)
            if is_stream:
                before, now = _joined(self._hidden[begin : begin + step])
                missing = missing + double((before - now).T @ quantized)
        return moments, drift, missing


def _joined(pairs: list[Pair]) -> Pair:
    xp = functions(pairs[0][0])
    return xp.concatenate([x for x, _ in pairs]), xp.concatenate([y for _, y in pairs])
