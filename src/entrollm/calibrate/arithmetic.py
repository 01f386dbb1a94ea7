"""The arithmetic between the matrix products in plain NumPy: gradients need it apart from the engine's native one."""

from __future__ import annotations

import numpy as np

from entrollm.engine.weights import Floats


def rms_norm(x: Floats, weight: Floats, eps: float) -> Floats:
    """Divide by the root of the mean square over the last axis, then multiply by `weight`.

    Args:
        x: float32 (..., features).
        weight: float32, broadcast against x.
        eps: added to the mean square.
    Returns:
        A new float32 (..., features).
    """
    mean_square = np.einsum("...i,...i->...", x, x) / np.float32(x.shape[-1])
    mean_square += np.float32(eps)
    normalised: Floats = x / np.sqrt(mean_square)[..., None]
    normalised *= weight
    return normalised


def rotate(x: Floats, cosines: Floats, sines: Floats) -> Floats:
    """Rotate feature i with feature i + rotary_dim / 2 of every head; features from rotary_dim on stay.

    Args:
        x: float32 (n, heads, head_dim).
        cosines, sines: float32 (n, 1, rotary_dim / 2).
    Returns:
        A new float32 (n, heads, head_dim).
    """
    half = cosines.shape[-1]
    first, second = x[..., :half], x[..., half : 2 * half]
    rotated = np.empty(x.shape, dtype=np.float32)
    np.subtract(first * cosines, second * sines, out=rotated[..., :half])
    np.add(second * cosines, first * sines, out=rotated[..., half : 2 * half])
    rotated[..., 2 * half :] = x[..., 2 * half :]
    return rotated


def swiglu(gate_up: Floats) -> Floats:
    """gate * sigmoid(gate) * up of float32 (n, 2 * features), gate first -> a new float32 (n, features)."""
    features = gate_up.shape[-1] // 2
    gate, up = gate_up[:, :features], gate_up[:, features:]
    activated = np.negative(gate)
    with np.errstate(over="ignore"):  # exp overflows to inf, and gate / inf is the right limit
        np.exp(activated, out=activated)
    activated += np.float32(1)
    np.divide(gate, activated, out=activated)
    activated *= up
    return activated
