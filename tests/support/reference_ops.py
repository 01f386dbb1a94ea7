"""The arithmetic between the matrix products in plain NumPy, which the native one is compared with."""

from __future__ import annotations

import numpy as np

from entrollm.engine.weights import Floats

# Attention scores in flight; 2**22 float32 are 16 MiB.
_MAX_SCORES = 2**22


def rms_norm(x: Floats, weight: Floats, eps: float) -> Floats:
    """Divide by the root of the mean square over the last axis, then multiply by `weight`, which is broadcast."""
    mean_square = np.einsum("...i,...i->...", x, x) / x.shape[-1]
    mean_square += np.float32(eps)
    normalised: Floats = x / np.sqrt(mean_square)[..., None] * weight
    return normalised


def rotate(x: Floats, cosines: Floats, sines: Floats) -> Floats:
    """Rotate feature i with feature i + rotary_dim / 2 of every head; features from rotary_dim on stay.

    Args:
        x: float32 (n, heads, head_dim).
        cosines, sines: float32 (n, 1, rotary_dim / 2).
    """
    half = cosines.shape[-1]
    first, second, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return np.concatenate([first * cosines - second * sines, second * cosines + first * sines, rest], axis=-1)


def swiglu(gate_up: Floats) -> Floats:
    """gate * sigmoid(gate) * up of float32 (n, 2 * features), gate first."""
    gate, up = np.split(gate_up, 2, axis=-1)
    with np.errstate(over="ignore"):  # exp overflows to inf, and what is divided by inf has the right limit
        activated: Floats = gate / (1 + np.exp(-gate)) * up
    return activated


def attention(queries: Floats, keys: Floats, values: Floats, window: int | None = None) -> Floats:
    """Causal attention with grouped heads, in memory that does not grow with the number of queries.

    Args:
        queries: float32 (n, heads, head_dim); the last n positions of the `length`.
        keys: float32 (kv_heads, head_dim, length); length >= n and heads a multiple of kv_heads.
        values: float32 (kv_heads, length, head_dim).
        window: how many positions back, itself included, a query sees; None for all.
    Returns:
        float32 (n, heads * head_dim).
    """
    n, heads, head_dim = queries.shape
    kv_heads, _, length = keys.shape
    queries = np.multiply(queries, np.float32(head_dim**-0.5))
    if n == 1 and (window is None or length <= window):
        grouped = queries.reshape(kv_heads, heads // kv_heads, head_dim)
        return _weighted_values(grouped, keys, values, None).reshape(1, heads * head_dim)
    output = np.empty((n, heads, head_dim), dtype=np.float32)
    step = max(1, _MAX_SCORES // (heads * length))
    for start in range(0, n, step):
        stop = min(start + step, n)
        past = length - n
        first = 0 if window is None else max(0, past + start - window + 1)
        last = past + stop
        rows = np.arange(past + start, last)[:, None]
        columns = np.arange(first, last)
        hidden = columns > rows
        if window is not None:
            hidden |= columns <= rows - window
        grouped = queries[start:stop].transpose(1, 0, 2).reshape(kv_heads, -1, head_dim)
        mixed = _weighted_values(grouped, keys[:, :, first:last], values[:, first:last], hidden)
        output[start:stop] = mixed.reshape(heads, stop - start, head_dim).transpose(1, 0, 2)
    return output.reshape(n, heads * head_dim)


def _weighted_values(
    queries: Floats, keys: Floats, values: Floats, hidden: np.ndarray[tuple[int, int], np.dtype[np.bool_]] | None
) -> Floats:
    """softmax(queries keys) values per key-value head; rows of queries repeat as often as `hidden` has rows."""
    scores: Floats = queries @ keys
    if hidden is not None:
        per_head = scores.reshape(scores.shape[0], -1, *hidden.shape)
        np.copyto(per_head, np.float32(-np.inf), where=hidden)
    scores -= scores.max(axis=-1, keepdims=True)
    np.exp(scores, out=scores)
    total = scores.sum(axis=-1, keepdims=True)
    mixed: Floats = scores @ values
    mixed /= total
    return mixed
