"""Sums over tokens and windows, and labels that are drawn from predictions."""

from __future__ import annotations

import numpy as np

from entrollm.arrays import Array, double, functions, like

# Activations of so many tokens wait for one product, which costs less than many small ones.
_TOKENS_PER_PRODUCT = 4096

RARE_TOKEN = 0.1
"""A token that the windows never suggest counts as this share of the mean one."""


def mean_moments(first: Array, second: Array) -> Array:
    """The mean of two estimates of one thing up to a factor; only lower triangles count."""
    mean = functions(first).zeros_like(first)
    for moments in (first, second):
        trace = float(functions(moments).trace(moments))
        if trace > 0:
            mean += moments / trace
    return mean


class Squares:
    """Sums over the gradients G of one matrix, one for each window.

    Attributes:
        columns: float64, G^T G; None before the first.
    """

    def __init__(self) -> None:
        self.columns: Array | None = None

    @property
    def total(self) -> float:
        """The sum of all squares."""
        return float(functions(self.columns).trace(self.columns))

    def add(self, gradient: Array) -> None:
        """Add one window's gradient, or rows of it."""
        self._add(gradient.T @ gradient)

    def add_product(self, x: Array, gradient: Array) -> None:
        """Add one window's gradient, made of a matrix's inputs (n, columns) and its outputs' gradients (n, rows)."""
        n, rows = gradient.shape
        columns = x.shape[1]
        if n * n * (rows + columns) + n * columns**2 < n * rows * columns + rows * columns**2:
            self._add(x.T @ ((gradient @ gradient.T) @ x))
        else:
            self.add(gradient.T @ x)

    def _add(self, product: Array) -> None:
        if self.columns is None:
            self.columns = double(product)
        else:
            self.columns += product


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


def draw_labels(logits: Array, generator: np.random.Generator) -> tuple[Array, Array]:
    """Predicted probabilities, in place of the logits, and one token drawn from each row's, int64."""
    xp = functions(logits)
    logits -= xp.amax(logits, axis=-1, keepdims=True)
    xp.exp(logits, out=logits)
    logits /= xp.sum(logits, axis=-1, keepdims=True)
    summed = xp.cumsum(logits, 1, dtype=xp.float64)
    points = like(logits, generator.random((len(logits), 1)))
    return logits, (summed <= points * summed[:, -1:]).sum(axis=1)
