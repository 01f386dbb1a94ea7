"""One worker process for each instruction set, since a process keeps the kernels that it started with."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable
from concurrent.futures import Executor, ProcessPoolExecutor
from typing import TypeVar

from entrollm import _core

T = TypeVar("T")


class InstructionSets:
    """Runs a function on every instruction set that this build and this processor have."""

    def __init__(self) -> None:
        context = multiprocessing.get_context("spawn")
        # Slowest first, so that the first one is the portable one.
        self._workers: dict[str, Executor] = {
            name: ProcessPoolExecutor(1, mp_context=context, initializer=_choose, initargs=(name,))
            for name, runs in reversed(_core.isas())
            if runs
        }
        self.names = tuple(self._workers)

    def each(self, function: Callable[..., T], *args: object) -> dict[str, T]:
        """The results by instruction set."""
        futures = {name: worker.submit(function, *args) for name, worker in self._workers.items()}
        return {name: future.result() for name, future in futures.items()}

    def shutdown(self) -> None:
        """End the workers."""
        for worker in self._workers.values():
            worker.shutdown()


def _choose(name: str) -> None:
    os.environ["ENTROLLM_ISA"] = name
