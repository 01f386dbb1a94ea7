"""The arithmetic of rarer parts in numpy, in float32; that of the usual ones is native."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from entrollm.engine.weights import Floats

_TANH_FACTOR, _TANH_CUBE = np.float32(0.7978845608028654), np.float32(0.044715)
# Coefficients of a rational approximation of the error function, whose error is below 1.5e-7.
_ERF_SHIFT = np.float32(0.3275911)
_ERF = tuple(np.float32(c) for c in (1.061405429, -1.453152027, 1.421413741, -0.284496736, 0.254829592))


def silu(x: Floats) -> Floats:
    """x / (1 + exp(-x))."""
    y: Floats = x / (1 + np.exp(-np.maximum(x, np.float32(-80))))
    return y


def gelu(x: Floats) -> Floats:
    """x times the normal distribution's share below x."""
    size = np.abs(x) * np.float32(0.7071067811865476)
    t = 1 / (1 + _ERF_SHIFT * size)
    polynomial = np.zeros_like(x)
    for coefficient in _ERF:
        polynomial += coefficient
        polynomial *= t
    erf = np.copysign(1 - polynomial * np.exp(-size * size), x)
    y: Floats = np.float32(0.5) * x * (1 + erf)
    return y


def gelu_tanh(x: Floats) -> Floats:
    """The approximation of gelu by a hyperbolic tangent."""
    y: Floats = x * x
    y *= _TANH_CUBE
    y += 1
    y *= x
    y *= _TANH_FACTOR
    np.tanh(y, out=y)
    y += 1
    y *= x
    y *= np.float32(0.5)
    return y


def relu2(x: Floats) -> Floats:
    """The square of the positive part."""
    y: Floats = np.maximum(x, np.float32(0))
    y *= y
    return y


def sigmoid(x: Floats) -> Floats:
    """1 / (1 + exp(-x))."""
    y: Floats = np.exp(-np.maximum(x, np.float32(-80)))
    y += 1
    np.reciprocal(y, out=y)
    return y


def clamped_glu(slope: float, limit: float, x: Floats) -> Floats:
    """The activation that `ClampedGlu` describes: float32 (n, 2 * size) -> float32 (n, size)."""
    gate = np.minimum(x[:, ::2], np.float32(limit))
    up = np.clip(x[:, 1::2], -limit, limit).astype(np.float32, copy=False)
    y: Floats = gate * sigmoid(np.float32(slope) * gate) * (up + 1)
    return y


ACTIVATIONS: Mapping[str, Callable[[Floats], Floats]] = {
    "silu": silu,
    "gelu": gelu,
    "gelu_tanh": gelu_tanh,
    "relu2": relu2,
}


def cap(x: Floats, bound: float) -> Floats:
    """bound * tanh(x / bound), in place."""
    x *= np.float32(1 / bound)
    np.tanh(x, out=x)
    x *= np.float32(bound)
    return x


def rotate_neighbours(x: Floats, cosines: Floats, sines: Floats) -> None:
    """Rotate features 2i and 2i + 1 of every head together, in place.

    Args:
        x: float32 (n, heads, head_dim), heads contiguous.
        cosines, sines: float32 (n, 1, half); the first 2 * half features are rotated.
    """
    pairs = x[..., : 2 * cosines.shape[-1]].view(np.complex64)
    pairs *= cosines + np.complex64(1j) * sines


def plain_attention(
    queries: Floats,
    keys: Floats,
    values: Floats,
    window: int | None,
    *,
    bound: float | None = None,
    sinks: Floats | None = None,
) -> Floats:
    """Causal attention with options that the native one lacks; the scale is 1.

    Args:
        queries, keys, values, window: as for `Mix`, but that values may have another number of features than keys.
        bound: scores are bounded by `cap`; None if they are not.
        sinks: float32 (heads,), a score of each head that takes part in the softmax and mixes no value; None if absent.
    Returns:
        float32 (n, heads * features of a value).
    """
    n, heads, head_dim = queries.shape
    kv_heads, _, length = keys.shape
    group = heads // kv_heads
    position = np.arange(length - n, length)[:, None]
    hidden = np.arange(length) > position
    if window is not None:
        hidden |= np.arange(length) <= position - window
    width = values.shape[2]
    out = np.empty((n, heads, width), dtype=np.float32)
    for head in range(kv_heads):
        ours = slice(head * group, (head + 1) * group)
        scores = (queries[:, ours].reshape(n * group, head_dim) @ keys[head]).reshape(n, group, length)
        if bound is not None:
            cap(scores, bound)
        np.copyto(scores, np.float32(-np.inf), where=hidden[:, None])
        most = scores.max(axis=-1, keepdims=True)
        if sinks is not None:
            most = np.maximum(most, sinks[ours, None])
        scores -= most
        np.exp(scores, out=scores)
        total = scores.sum(axis=-1, keepdims=True)
        if sinks is not None:
            total += np.exp(sinks[ours, None] - most)
        scores /= total
        out[:, ours] = (scores.reshape(n * group, length) @ values[head]).reshape(n, group, width)
    return out.reshape(n, heads * width)
