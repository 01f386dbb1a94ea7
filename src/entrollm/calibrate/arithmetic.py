"""The arithmetic between matrix products, on NumPy arrays or torch tensors."""

from __future__ import annotations

import numpy as np

from entrollm.arrays import Array, functions


def rms_norm(x: Array, weight: Array, eps: float) -> Array:
    """Divide by the root of the mean square over the last axis, then multiply by `weight`.

    Args:
        x: float32 (..., features).
        weight: float32, broadcast against x.
        eps: added to the mean square.
    Returns:
        A new float32 (..., features).
    """
    normalised = x / _root_mean_square(x, eps)
    normalised *= weight
    return normalised


def rms_norm_gradient(x: Array, weight: Array, eps: float, gradient: Array) -> Array:
    """The gradient of x in rms_norm(x, weight, eps), given that of the result."""
    inverse = 1 / _root_mean_square(x, eps)
    gradient = gradient * weight
    along = functions(x).einsum("...i,...i->...", gradient, x)[..., None] / x.shape[-1]
    return inverse * (gradient - x * (along * (inverse * inverse)))


def _root_mean_square(x: Array, eps: float) -> Array:
    """float32 (..., features) -> float32 (..., 1)."""
    xp = functions(x)
    mean_square = xp.einsum("...i,...i->...", x, x) / x.shape[-1]
    mean_square += eps
    return xp.sqrt(mean_square)[..., None]


def rotate(x: Array, cosines: Array, sines: Array) -> Array:
    """Rotate feature i with feature i + rotary_dim / 2 of every head; features from rotary_dim on stay.

    Args:
        x: float32 (n, heads, head_dim).
        cosines, sines: float32 (n, 1, rotary_dim / 2).
    Returns:
        A new float32 (n, heads, head_dim).
    """
    half = cosines.shape[-1]
    first, second = x[..., :half], x[..., half : 2 * half]
    xp = functions(x)
    rotated = xp.empty_like(x)
    xp.subtract(first * cosines, second * sines, out=rotated[..., :half])
    xp.add(second * cosines, first * sines, out=rotated[..., half : 2 * half])
    rotated[..., 2 * half :] = x[..., 2 * half :]
    return rotated


def swiglu(gate_up: Array) -> Array:
    """gate * sigmoid(gate) * up of float32 (n, 2 * features), gate first -> a new float32 (n, features)."""
    features = gate_up.shape[-1] // 2
    gate, up = gate_up[:, :features], gate_up[:, features:]
    activated = gate / _one_plus_exp_of_minus(gate)
    activated *= up
    return activated


def swiglu_gradient(gate_up: Array, gradient: Array) -> Array:
    """The gradient of gate_up in swiglu(gate_up), given that of the result."""
    features = gate_up.shape[-1] // 2
    gate, up = gate_up[:, :features], gate_up[:, features:]
    sigmoid = 1 / _one_plus_exp_of_minus(gate)
    activated = gate * sigmoid
    parts = [gradient * up * (sigmoid + activated * (1 - sigmoid)), gradient * activated]
    return functions(gate_up).concatenate(parts, axis=1)


def _one_plus_exp_of_minus(x: Array) -> Array:
    xp = functions(x)
    exponential = xp.negative(x)
    with np.errstate(over="ignore"):  # exp overflows to inf, and what is divided by inf has the right limit
        xp.exp(exponential, out=exponential)
    exponential += 1
    return exponential


def softmax(scores: Array) -> Array:
    """Shares over the last axis, in place of the scores."""
    xp = functions(scores)
    scores -= xp.amax(scores, axis=-1, keepdims=True)
    xp.exp(scores, out=scores)
    scores /= xp.sum(scores, axis=-1, keepdims=True)
    return scores
