"""Gradients through one decoder layer and through the head, by hand, for windows read from an empty context."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from entrollm.calibrate.arithmetic import rms_norm, rotate, swiglu
from entrollm.engine.config import ModelConfig
from entrollm.engine.weights import Floats

Read = Callable[[str], Floats]
Record = Callable[[str, Floats, Floats], None]


@dataclass(frozen=True)
class _Part:
    """Matrices on one input, stacked.

    Attributes:
        names: of the tensors.
        weight: float32 (out_features, in_features).
        bias: float32 (out_features,) or 0.
    """

    names: tuple[str, ...]
    rows: tuple[int, ...]
    weight: Floats
    bias: Floats | np.float32

    def forward(self, x: Floats) -> Floats:
        y: Floats = x @ self.weight.T
        y += self.bias
        return y

    def backward(self, x: Floats, gradient: Floats, record: Record) -> Floats:
        """Record what the gradient of each matrix is made of, and return that of the input."""
        begin = 0
        for name, rows in zip(self.names, self.rows, strict=True):
            record(name, x, gradient[:, begin : begin + rows])
            begin += rows
        passed: Floats = gradient @ self.weight
        return passed


class LayerGradient:
    """One layer's weights, and the gradients that go through it.

    Args:
        config: the model's.
        read: a tensor by name, in float32.
        index: the layer.
    """

    def __init__(self, config: ModelConfig, read: Read, index: int) -> None:
        self._config = config
        self._window = config.windows[index]
        prefix = f"model.layers.{index}."
        self._attention_norm = read(f"{prefix}input_layernorm.weight")
        self._mlp_norm = read(f"{prefix}post_attention_layernorm.weight")
        qkv = ("qkv_proj",) if config.fused else ("q_proj", "k_proj", "v_proj")
        gate_up = ("gate_up_proj",) if config.fused else ("gate_proj", "up_proj")
        attention, mlp = f"{prefix}self_attn.", f"{prefix}mlp."
        self._qkv = _part(read, attention, qkv, config.qkv_bias)
        self._output = _part(read, attention, ("o_proj",), config.output_bias)
        self._gate_up = _part(read, mlp, gate_up, config.mlp_bias)
        self._down = _part(read, mlp, ("down_proj",), config.mlp_bias)
        self._qk_norm: Floats | None = None
        if config.qk_norm:
            q_norm, k_norm = read(f"{attention}q_norm.weight"), read(f"{attention}k_norm.weight")
            self._qk_norm = np.stack([q_norm] * config.num_heads + [k_norm] * config.num_kv_heads)

    def __call__(self, x: Floats, tables: tuple[Floats, Floats], gradient: Floats, record: Record) -> Floats:
        """Pass a gradient back through the layer.

        Args:
            x: float32 (n, hidden_size), what the layer read.
            tables: cosines and sines of the n positions.
            gradient: float32 (n, hidden_size), of what it gave.
            record: called with the name of each matrix, its inputs x, float32 (n, in_features), and the gradient dy
                of its outputs, float32 (n, out_features); the gradient of the matrix is dy^T x.
        Returns:
            float32 (n, hidden_size), the gradient of x.
        """
        eps = self._config.norm_eps
        normed = rms_norm(x, self._attention_norm, eps)
        attention = _AttentionGradient(self._config, self._window, self._qk_norm, tables)
        mixed = attention.forward(self._qkv.forward(normed))
        middle = x + self._output.forward(mixed)
        mlp_normed = rms_norm(middle, self._mlp_norm, eps)
        gate_up = self._gate_up.forward(mlp_normed)

        inner = self._down.backward(swiglu(gate_up), gradient, record)
        inner = self._gate_up.backward(mlp_normed, swiglu_gradient(gate_up, inner), record)
        gradient = gradient + rms_norm_gradient(middle, self._mlp_norm, eps, inner)
        inner = self._output.backward(mixed, gradient, record)
        inner = self._qkv.backward(normed, attention.backward(inner), record)
        gradient += rms_norm_gradient(x, self._attention_norm, eps, inner)
        return gradient


class _AttentionGradient:
    """From the outputs of q, k and v to the mixed values, and back."""

    def __init__(
        self, config: ModelConfig, window: int | None, qk_norm: Floats | None, tables: tuple[Floats, Floats]
    ) -> None:
        self._config = config
        self._window = window
        self._qk_norm = qk_norm
        self._tables = tables
        self._scale = np.float32(config.head_dim**-0.5)

    def forward(self, qkv: Floats) -> Floats:
        """float32 (n, q, k and v side by side) -> float32 (n, heads * head_dim)."""
        config, n = self._config, len(qkv)
        heads, rotated = config.num_heads, config.num_heads + config.num_kv_heads
        split = qkv.reshape(n, -1, config.head_dim)
        self._raw = split[:, :rotated]
        qk = self._raw if self._qk_norm is None else rms_norm(self._raw, self._qk_norm, config.norm_eps)
        qk = rotate(qk, *self._tables)
        # (kv_heads, group, n, head_dim) and (kv_heads, 1, n, head_dim)
        self._queries = qk[:, :heads].transpose(1, 0, 2).reshape(config.num_kv_heads, -1, n, config.head_dim)
        self._queries = self._queries * self._scale
        self._keys = qk[:, heads:].transpose(1, 0, 2)[:, None]
        self._values = split[:, rotated:].transpose(1, 0, 2)[:, None]
        scores: Floats = self._queries @ self._keys.swapaxes(2, 3)
        rows, columns = np.arange(n)[:, None], np.arange(n)
        hidden = columns > rows
        if self._window is not None:
            hidden |= columns <= rows - self._window
        scores[..., hidden] = -np.inf
        scores -= scores.max(axis=-1, keepdims=True)
        np.exp(scores, out=scores)
        scores /= scores.sum(axis=-1, keepdims=True)
        self._shares = scores
        mixed: Floats = scores @ self._values
        joined: Floats = mixed.reshape(heads, n, config.head_dim).transpose(1, 0, 2).reshape(n, -1)
        return joined

    def backward(self, gradient: Floats) -> Floats:
        """The gradient of `qkv`, given that of the mixed values."""
        config, n = self._config, len(gradient)
        mixed = gradient.reshape(n, config.num_heads, config.head_dim).transpose(1, 0, 2)
        mixed = mixed.reshape(self._queries.shape)
        values = (self._shares.swapaxes(2, 3) @ mixed).sum(axis=1)
        scores = mixed @ self._values.swapaxes(2, 3)
        scores -= np.einsum("...ij,...ij->...i", scores, self._shares)[..., None]
        scores *= self._shares
        queries = (scores @ self._keys) * self._scale
        keys = (scores.swapaxes(2, 3) @ self._queries).sum(axis=1)
        cosines, sines = self._tables
        qk = np.concatenate([queries.reshape(-1, n, config.head_dim), keys]).transpose(1, 0, 2)
        # A rotation's transpose turns the other way.
        qk = rotate(qk, cosines, -sines)
        if self._qk_norm is not None:
            qk = rms_norm_gradient(self._raw, self._qk_norm, config.norm_eps, qk)
        return np.concatenate([qk, values.transpose(1, 0, 2)], axis=1).reshape(n, -1)


def rms_norm_gradient(x: Floats, weight: Floats, eps: float, gradient: Floats) -> Floats:
    """The gradient of x in rms_norm(x, weight, eps), given that of the result."""
    mean_square = np.einsum("...i,...i->...", x, x) / np.float32(x.shape[-1]) + np.float32(eps)
    inverse = (1 / np.sqrt(mean_square))[..., None]
    gradient = gradient * weight
    along = np.einsum("...i,...i->...", gradient, x)[..., None] / np.float32(x.shape[-1])
    passed: Floats = inverse * (gradient - x * (along * np.square(inverse)))
    return passed


def swiglu_gradient(gate_up: Floats, gradient: Floats) -> Floats:
    """The gradient of gate_up in swiglu(gate_up), given that of the result."""
    features = gate_up.shape[-1] // 2
    gate, up = gate_up[:, :features], gate_up[:, features:]
    with np.errstate(over="ignore"):  # exp overflows to inf, and 1 / inf is the right limit
        sigmoid = 1 / (1 + np.exp(-gate))
    activated = gate * sigmoid
    return np.concatenate([gradient * up * (sigmoid + activated * (1 - sigmoid)), gradient * activated], axis=1)


def draw_labels(logits: Floats, generator: np.random.Generator) -> tuple[Floats, NDArray[np.int64]]:
    """Predicted probabilities, in place of the logits, and one token drawn from each row's."""
    logits -= logits.max(axis=1, keepdims=True)
    np.exp(logits, out=logits)
    logits /= logits.sum(axis=1, keepdims=True)
    summed = np.cumsum(logits, axis=1, dtype=np.float64)
    labels = np.argmax(summed > generator.random((len(logits), 1)) * summed[:, -1:], axis=1)
    return logits, labels


def _part(read: Read, prefix: str, outputs: tuple[str, ...], has_bias: bool) -> _Part:
    names = tuple(f"{prefix}{name}.weight" for name in outputs)
    matrices = [read(name) for name in names]
    bias: Floats | np.float32 = np.float32(0)
    if has_bias:
        bias = np.concatenate([read(f"{prefix}{name}.bias") for name in outputs])
    return _Part(names, tuple(len(matrix) for matrix in matrices), np.concatenate(matrices), bias)
