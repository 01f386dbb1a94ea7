"""How many threads a repeated step takes, by its own timing."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

# Of so many steps, the first two are taken with the number of threads that was slower.
_PERIOD = 32
_TRIALS = 2
# What a new time weighs in the mean of the earlier ones.
_WEIGHT = 0.3


class QuickestThreads:
    """Chooses between all of torch's threads and one for steps of about equal work.

    A product waits for the slowest of its threads. Where other processes use the machine too, one of them may have to
    wait for a core for milliseconds, so that products of few rows take many times as long as with one thread.
    """

    def __init__(self) -> None:
        self._all = torch.get_num_threads()
        self._means: dict[int, float] = {}
        self._steps = 0

    @contextmanager
    def step(self) -> Iterator[None]:
        """Take a step with the threads that it gives torch."""
        threads = self._next()
        torch.set_num_threads(threads)
        started = time.perf_counter()
        try:
            yield
        finally:
            elapsed = time.perf_counter() - started
            mean = self._means.get(threads, elapsed)
            self._means[threads] = mean + _WEIGHT * (elapsed - mean)
            torch.set_num_threads(self._all)

    def _next(self) -> int:
        choices = sorted({self._all, 1}, key=lambda threads: self._means.get(threads, 0.0))
        is_trial = self._steps % _PERIOD < _TRIALS
        self._steps += 1
        return choices[-1 if is_trial else 0]
