"""How far a compression run is."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class CompressProgress:
    """How far a run is; sent after every chunk.

    Attributes:
        weights_done, weights: coded weights that are finished, and all weights to code.
        tensor: the tensor that is being coded.
    """

    weights_done: int
    weights: int
    tensor: str


class ProgressCounter:
    """Counts finished weights, from any thread, and reports each change."""

    def __init__(self, weights: int, on_progress: Callable[[CompressProgress], None] | None) -> None:
        self._weights = weights
        self._on_progress = on_progress
        self._done = 0
        self._lock = threading.Lock()

    def add(self, tensor: str, weights: int) -> None:
        """Count weights of a tensor as finished."""
        with self._lock:
            self._done += weights
        if self._on_progress is not None:
            self._on_progress(CompressProgress(self._done, self._weights, tensor))
