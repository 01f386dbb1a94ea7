"""Sums over tokens and windows, and labels that are drawn from predictions."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from entrollm.calibrate.products import estimate, moments

TOKENS_PER_PRODUCT = 4096
"""Activations of so many tokens wait for one product, which costs less than many small ones."""
# Gradients of so many windows are made at once that they have about this many numbers.
_GRADIENT_NUMBERS = 1 << 24

RARE_TOKEN = 0.1
"""A token that the windows never suggest counts as this share of the mean one."""


def mean_moments(first: Tensor, second: Tensor) -> Tensor:
    """The mean of two estimates of one thing up to a factor; only lower triangles count."""
    mean = torch.zeros_like(first)
    for found in (first, second):
        trace = float(torch.trace(found))
        if trace > 0:
            mean += found / trace
    return mean


class Squares:
    """Sums over the gradients G of one matrix, one for each window.

    Attributes:
        columns: float64, G^T G, whose lower triangle counts; None before the first.
    """

    def __init__(self) -> None:
        self.columns: Tensor | None = None

    @property
    def total(self) -> float:
        """The sum of all squares."""
        return 0.0 if self.columns is None else float(torch.trace(self.columns))

    def add(self, gradient: Tensor) -> None:
        """Add one window's gradient, rows of it, or several one below the other."""
        self._add(moments(gradient))

    def add_products(self, x: Tensor, gradient: Tensor) -> None:
        """Add the gradients of windows of n tokens.

        Args:
            x: float32, shape (windows, n, columns), the inputs of the matrix.
            gradient: float32, shape (windows, n, rows), of its outputs.
        """
        windows, n, rows = gradient.shape
        columns = x.shape[2]
        # The products of the second way take half of the time: one is an estimate, the other symmetric.
        if n * n * (rows + columns) + n * columns**2 < (n * rows * columns + rows * columns**2) / 2:
            self._add(x.flatten(0, 1).T @ ((gradient @ gradient.mT) @ x).flatten(0, 1))
            return
        step = max(1, _GRADIENT_NUMBERS // (rows * columns))
        for begin in range(0, windows, step):
            part = slice(begin, begin + step)
            self.add(estimate(gradient[part], x[part]).flatten(0, 1))

    def _add(self, product: Tensor) -> None:
        if self.columns is None:
            self.columns = product.double()
        else:
            self.columns += product


class Moments:
    """The sum of x x^T in float64 over rows x.

    Args:
        known: the sum over earlier rows, which is added to; None if there are none.
    """

    def __init__(self, known: Tensor | None = None) -> None:
        self._waiting: list[Tensor] = []
        self._tokens = 0
        self._sum = known

    def add(self, x: Tensor) -> None:
        """Add float32 (n, columns), which must not change any more."""
        self._waiting.append(x)
        self._tokens += len(x)
        if self._tokens >= TOKENS_PER_PRODUCT:
            self._flush()

    def total(self) -> Tensor:
        """The sum over at least one row: float64 (columns, columns), whose lower triangle counts."""
        self._flush()
        assert self._sum is not None
        return self._sum

    def _flush(self) -> None:
        if not self._waiting:
            return
        x = torch.cat(self._waiting) if len(self._waiting) > 1 else self._waiting[0]
        self._waiting.clear()
        self._tokens = 0
        product = moments(x)
        if self._sum is None:
            self._sum = product.double()
        else:
            self._sum += product


def draw_labels(logits: Tensor, points: NDArray[np.float64]) -> tuple[Tensor, Tensor]:
    """Predicted probabilities, in place of the logits, and one token drawn from each row's, int64.

    Args:
        logits: float32, shape (rows, vocabulary).
        points: shape (rows,), random numbers in [0, 1), which decide between the tokens.
    """
    logits -= logits.amax(-1, keepdim=True)
    logits.exp_()
    logits /= logits.sum(-1, keepdim=True)
    summed = logits.cumsum(1, dtype=torch.float64)
    places = torch.from_numpy(points[:, None]).to(summed)
    return logits, (summed <= places * summed[:, -1:]).sum(1)


def random_numbers(windows: NDArray[np.int64], count: int) -> NDArray[np.float64]:
    """Random numbers in [0, 1), shape (windows, count), which depend on the numbers of the windows alone."""
    generators = (np.random.Generator(np.random.PCG64(0).advance(int(window) * count)) for window in windows)
    return np.stack([generator.random(count) for generator in generators])
