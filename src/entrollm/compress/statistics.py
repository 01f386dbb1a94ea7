"""The interface of what calibration measured of a model; `entrollm.calibrate` implements it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from entrollm.arrays import Array, Device
from entrollm.checkpoint.model_folder import Checkpoint
from entrollm.compress.source import Stamps
from entrollm.quantize.statistics import Sensitivity


class Drift(Protocol):
    """How quantized matrices change the inputs of the matrices after them."""

    def correction(self, name: str) -> Array | None:
        """What to add to a matrix before it is rounded. It must be asked for in the order of `Statistics.order`.

        Returns:
            float32, the shape of the matrix, on the device of the statistics; None if there is nothing to add.
        """

    def record(self, name: str, weights: Callable[[], Array]) -> None:
        """Record what a matrix became; a matrix without a record counts as unchanged.

        Args:
            name: the matrix.
            weights: reads it, in NumPy or on the device of the statistics; called when it is needed, or never.
        """


class Statistics(Protocol):
    """What calibration measured of a model's matrices.

    Attributes:
        fingerprint: equal for equal statistics of one model.
        device: where the factors are; it quantizes with them.
        source: the stamps of the checkpoint when it was opened for calibration; empty if unknown.
    """

    @property
    def device(self) -> Device: ...

    @property
    def fingerprint(self) -> str: ...

    @property
    def source(self) -> Stamps: ...

    def factor(self, name: str) -> Array | None:
        """The lower triangle L with L L^T = the damped second moments of the inputs of a matrix.

        Returns:
            float32, shape (columns, columns), with a positive diagonal; None if unknown.
        """

    def sensitivity(self, name: str) -> Sensitivity | None:
        """How errors of a matrix affect predictions; None if unknown."""

    @property
    def order(self) -> Sequence[str]:
        """The matrices with factors, in the order in which the model multiplies with them."""

    def drift(self, checkpoint: Checkpoint) -> Drift:
        """A new walk through the model of an open checkpoint, in which nothing is quantized yet."""
