"""What calibration measures of a matrix: its sensitivity, and the second moments of its inputs."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from entrollm.arrays import Array, functions, like, single


@dataclass(frozen=True)
class Sensitivity:
    """How errors of a matrix affect a model's predictions.

    Attributes:
        share: the KL divergence in nats that white noise causes: KL = share * relative error^2.
        row_weights: float32, shape (rows,), the part of each row in this, relative to the mean; None if all are alike.
    """

    share: float
    row_weights: NDArray[np.float32] | None = None


# Second moments are estimates, and a model will see other text than that of the calibration. Correlations are therefore
# trusted a little less than measured, and no direction counts as unused.
_SHRINKAGE = 0.05
_DAMPING = 0.02


def damped_factor(moments: Array) -> Array:
    """The Cholesky factor of shrunken, damped second moments.

    Args:
        moments: float64, shape (n, n), symmetric and positive semi-definite, of which only the lower triangle is read.
            Inputs may be dead (always 0).
    Returns:
        float32, shape (n, n), lower triangle; the identity if all inputs are dead.
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
