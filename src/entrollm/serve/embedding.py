"""/v1/embeddings: the mean of a text's last hidden states, or the last of them."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import Sequence
from functools import partial
from itertools import islice
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from entrollm.engine.sampling import check_finite
from entrollm.engine.weights import Floats
from entrollm.serve.errors import ApiError
from entrollm.serve.job import Event, Job
from entrollm.serve.scheduler import Scheduler

Pooling = Literal["mean", "last"]
# Texts of one request that wait or run at a time, so that a long list does not fill the queue.
_AT_A_TIME = 8


class Pooled:
    """The vector of one text, made while it is read; see `observe` of SequenceStep."""

    def __init__(self, pooling: Pooling) -> None:
        self._pooling = pooling
        self._sum: NDArray[np.float64] | None = None

    def __call__(self, start: int, hidden: Floats) -> None:
        """Take the hidden states of the tokens from `start` on.

        Raises:
            FormatError: they are not finite.
        """
        check_finite(hidden, "hidden states")
        if self._pooling == "last":
            self._sum = hidden[-1].astype(np.float64)
            return
        added = hidden.sum(axis=0, dtype=np.float64)
        self._sum = added if start == 0 or self._sum is None else self._sum + added

    def vector(self, dimensions: int | None) -> Floats:
        """The vector, of length 1 unless it is zero: float32 (dimensions,).

        Args:
            dimensions: how many of its numbers to keep; `None` for all.
        """
        assert self._sum is not None
        kept = self._sum[:dimensions]
        length = float(np.linalg.norm(kept))
        return (kept / length if length > 0 else kept).astype(np.float32)


def encoded(vector: Floats, encoding: Literal["float", "base64"]) -> list[float] | str:
    """A vector as a list, or as its little-endian bytes in base64."""
    if encoding == "float":
        return [float(number) for number in vector]
    return base64.b64encode(vector.astype("<f4").tobytes()).decode()


async def read_all(scheduler: Scheduler, jobs: Sequence[Job]) -> Sequence[Job]:
    """Let prompts be read, a few at a time, and return the jobs; what is left is given up if one fails.

    Raises:
        ApiError: the queue is full, or one of them failed.
    """
    events: asyncio.Queue[tuple[Job, Event]] = asyncio.Queue()

    def put(job: Job, event: Event) -> None:
        events.put_nowait((job, event))

    waiting = iter(jobs)
    running: set[Job] = set()
    try:
        while True:
            for job in islice(waiting, _AT_A_TIME - len(running)):
                job.sink = partial(put, job)
                scheduler.submit([job])
                running.add(job)
            if not running:
                return jobs
            job, event = await events.get()
            running.discard(job)
            if isinstance(event, ApiError):
                raise event
    finally:
        if running:
            scheduler.cancel(list(running))
