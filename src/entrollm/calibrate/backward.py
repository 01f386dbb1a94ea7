"""Gradients through one decoder layer and through the head, by hand, for windows read from an empty context."""

from __future__ import annotations

from collections.abc import Callable

from entrollm.arrays import Array, functions
from entrollm.calibrate.arithmetic import rms_norm, rms_norm_gradient, rotate, swiglu, swiglu_gradient
from entrollm.calibrate.layer import LayerWeights, Part, WindowAttention

Record = Callable[[str, Array, Array], None]


class LayerGradient:
    """The gradients that go through one layer.

    Args:
        layer: its weights.
        tables: cosines and sines of the positions of a window.
        mask: see `WindowAttention`.
    """

    def __init__(self, layer: LayerWeights, tables: tuple[Array, Array], mask: Array) -> None:
        self._layer = layer
        self._attention = _AttentionGradient(layer, tables, mask)

    def __call__(self, x: Array, gradient: Array, record: Record) -> Array:
        """Pass a gradient back through the layer.

        Args:
            x: float32 (n, hidden_size), what the layer read.
            gradient: float32 (n, hidden_size), of what it gave.
            record: called with the name of each matrix, its inputs x, float32 (n, in_features), and the gradient dy
                of its outputs, float32 (n, out_features); the gradient of the matrix is dy^T x.
        Returns:
            float32 (n, hidden_size), the gradient of x.
        """
        layer, eps = self._layer, self._layer.config.norm_eps
        normed = rms_norm(x, layer.attention_norm, eps)
        mixed = self._attention(layer.qkv(normed))
        middle = x + layer.output(mixed)
        mlp_normed = rms_norm(middle, layer.mlp_norm, eps)
        gate_up = layer.gate_up(mlp_normed)

        inner = _pass(layer.down, swiglu(gate_up), gradient, record)
        inner = _pass(layer.gate_up, mlp_normed, swiglu_gradient(gate_up, inner), record)
        gradient = gradient + rms_norm_gradient(middle, layer.mlp_norm, eps, inner)
        inner = _pass(layer.output, mixed, gradient, record)
        inner = _pass(layer.qkv, normed, self._attention.backward(inner), record)
        gradient += rms_norm_gradient(x, layer.attention_norm, eps, inner)
        return gradient


def _pass(part: Part, x: Array, gradient: Array, record: Record) -> Array:
    """Record what the gradient of each matrix is made of, and return that of the input."""
    begin = 0
    for name, rows in zip(part.names, part.rows, strict=True):
        record(name, x, gradient[:, begin : begin + rows])
        begin += rows
    return gradient @ part.weight


class _AttentionGradient(WindowAttention):
    """From the outputs of q, k and v to the mixed values, and back."""

    def backward(self, gradient: Array) -> Array:
        """The gradient of the outputs of q, k and v that went forward last, given that of the mixed values."""
        config, n = self.layer.config, len(gradient)
        xp = functions(gradient)
        mixed = gradient.reshape(n, config.num_heads, config.head_dim).swapaxes(0, 1)
        mixed = mixed.reshape(self.queries.shape)
        values = (self.shares.swapaxes(2, 3) @ mixed).sum(axis=1)
        scores = mixed @ self.values.swapaxes(2, 3)
        scores -= xp.einsum("...ij,...ij->...i", scores, self.shares)[..., None]
        scores *= self.shares
        queries = (scores @ self.keys) * self.scale
        keys = (scores.swapaxes(2, 3) @ self.queries).sum(axis=1)
        cosines, sines = self.tables
        qk = xp.concatenate([queries.reshape(-1, n, config.head_dim), keys]).swapaxes(0, 1)
        # A rotation's transpose turns the other way.
        qk = rotate(qk, cosines, -sines)
        if self.layer.qk_norm is not None:
            raw = self.qkv.reshape(n, -1, config.head_dim)[:, : qk.shape[1]]
            qk = rms_norm_gradient(raw, self.layer.qk_norm, config.norm_eps, qk)
        return xp.concatenate([qk, values.swapaxes(0, 1)], axis=1).reshape(n, -1)
