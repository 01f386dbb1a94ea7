"""What calibration tells a quantizer about a matrix."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from entrollm.arrays import Array, Device, functions, like, single
from entrollm.checkpoint.model_folder import Checkpoint


@dataclass(frozen=True)
class Sensitivity:
    """What errors of a matrix do to a model's predictions.

    Attributes:
        share: KL divergence in nats of a white error of the matrix's own size: KL = share * relative error^2.
        row_weights: float32, shape (rows,), how much of it is due to each row, relative to the mean; None for alike.
    """

    share: float
    row_weights: NDArray[np.float32] | None = None


class Drift(Protocol):
    """What the quantized matrices of a model do to the inputs of those after them."""

    def correction(self, name: str) -> Array | None:
        """What is added to a matrix before it is rounded; matrices are asked for in the order of `Statistics.order`.

        Returns:
            float32, the shape of the matrix, on the device of the statistics; None for nothing.
        """

    def record(self, name: str, weights: Callable[[], NDArray[np.float32]]) -> None:
        """Take note of what a matrix has become, to be read when it is needed; else it counts as unchanged."""


class Statistics(Protocol):
    """What is known of a model's matrices.

    Attributes:
        fingerprint: equal for equal statistics of one model.
        device: where factors are, and what quantizes with them.
    """

    @property
    def device(self) -> Device: ...

    @property
    def fingerprint(self) -> str: ...

    def factor(self, name: str) -> Array | None:
        """A lower triangle L with L L^T = the damped second moments that weigh errors by column; None where unknown.

        Returns:
            float32, shape (columns, columns), with positive diagonal.
        """

    def sensitivity(self, name: str) -> Sensitivity | None:
        """How much errors of a matrix matter; None where unknown."""

    @property
    def order(self) -> Sequence[str]:
        """The matrices with factors, in the order in which the model multiplies with them."""

    def drift(self, checkpoint: Checkpoint) -> Drift:
        """A walk through the model, whose open checkpoint is given, that starts with nothing quantized."""


# Second moments are estimates, and the text that a model will see differs from the calibration text: correlations are
# trusted a little less than they look, and no direction is taken for unused.
_SHRINKAGE = 0.05
_DAMPING = 0.02


def damped_factor(moments: Array) -> Array:
    """Cholesky factor of shrunken, damped second moments.

    Args:
        moments: float64, shape (n, n), symmetric and positive semi-definite; inputs may be dead (zero). Only the lower
            triangle is read.
    Returns:
        float32, lower triangle; the identity where all inputs are dead.
    """
    xp = functions(moments)
    diagonal = xp.diagonal(moments)
    mean = float(diagonal.mean())
    if mean <= 0:
        return like(moments, np.eye(len(moments), dtype=np.float32))
    damped = moments * (1 - _SHRINKAGE)
    places = np.arange(len(moments))
    damped[places, places] = diagonal + _DAMPING * mean
    return single(xp.linalg.cholesky(damped))
