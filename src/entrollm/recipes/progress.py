"""How a compression reports where it is."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Literal, Protocol

if TYPE_CHECKING:
    from entrollm.compress.progress import CompressProgress
    from entrollm.recipes.search import Trial

Stage = Literal["writing", "calibrating", "compressing", "tuning", "measuring"]
"""What is being done: the model writes text to calibrate on; statistics are measured; weights are quantized and coded;
scales are tuned; the result is compared with the original. A search for `max_kl` compresses and tunes once for every
size that it tries."""


class Progress(Protocol):
    """Receives the progress of a compression. Worker threads call it too, one at a time or together."""

    def advance(self, stage: Stage, done: float, total: float) -> None:
        """Record that `done` of `total` units of a stage are finished.

        The units are tokens when writing, layers (each counts twice) when calibrating, weights when compressing,
        windows when tuning, and tokens when measuring.
        """

    def tried(self, trial: Trial) -> None:
        """Record a size that the search for `max_kl` has measured."""


class Silent:
    """A `Progress` that does nothing."""

    def advance(self, stage: Stage, done: float, total: float) -> None:
        """Do nothing."""

    def tried(self, trial: Trial) -> None:
        """Do nothing."""


def report_weights(progress: Progress) -> Callable[[CompressProgress], None]:
    """A callback that passes on what `compress_folder` reports."""
    return lambda done: progress.advance("compressing", done.weights_done, done.weights)
