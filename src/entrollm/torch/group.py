"""The processes that torchrun started, as a group that shares a calibration."""

from __future__ import annotations

import os
import pickle
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, distributed
from torch.distributed.rendezvous import rendezvous

from entrollm.errors import EntroLLMError, UnsupportedError
from entrollm.threads import default_threads
from entrollm.torch.device import check_gpu

Value = TypeVar("Value")

# The others wait while the first process quantizes. That a process has ended is known from its connection, or torchrun
# tells by a signal.
_TIMEOUT = timedelta(days=7)
# Python has to come in between for signals to be handled: at first all the time, later every millisecond.
_EAGER_S, _PAUSE_S = 0.002, 0.001


class TorchGroup:
    """All processes that torchrun started; see `entrollm.processes.Group`. It works between `open` and `close`.

    Arrays on GPUs are exchanged by NCCL, all else by Gloo.

    Args:
        kind: what computes: "cuda" for one GPU for each process, or "cpu".
    """

    def __init__(self, kind: str) -> None:
        self._kind = kind
        self._local = int(os.environ["LOCAL_RANK"])
        self.neighbors = int(os.environ["LOCAL_WORLD_SIZE"])
        self._store, self.rank, self.size = next(iter(rendezvous("env://", timeout=_TIMEOUT)))

    def open(self) -> None:
        """Connect the processes.

        Raises:
            EntroLLMError: a process has ended.
            UnsupportedError: torch finds fewer GPUs than there are processes on this machine.
        """
        backend = "gloo"
        if self._kind == "cuda":
            check_gpu()
            self._check_gpus(torch.cuda.device_count())
            torch.cuda.set_device(self._local)
            backend = "cpu:gloo,cuda:nccl"
        else:
            torch.set_num_threads(max(1, default_threads() // self.neighbors))
        with_store = {"store": self._store, "rank": self.rank, "world_size": self.size}
        self._named(lambda: distributed.init_process_group(backend, timeout=_TIMEOUT, **with_store))

    def close(self) -> None:
        """Disconnect the processes; each method must have been called as often in all of them."""
        distributed.destroy_process_group()

    def is_first_to_fail(self) -> bool:
        """Whether no other process has called this before; the first one can tell the cause."""
        try:
            return int(self._store.add("entrollm-failures", 1)) == 1
        except RuntimeError:  # the store is gone
            return True

    def sum(self, array: Any) -> None:
        """Replace an array by its sum over all processes.

        Raises:
            EntroLLMError: a process has ended.
        """
        self._wait(lambda: distributed.all_reduce(_tensor(array), async_op=True))

    def broadcast(self, array: Tensor) -> None:
        """Replace a tensor by that of the first process.

        Raises:
            EntroLLMError: a process has ended.
        """
        self._send(array.contiguous() if self.rank == 0 else array, 0)

    def from_first(self, value: Value) -> Value:
        """The value that the first process gives.

        Raises:
            EntroLLMError: a process has ended.
        """
        return self._value_of(0, value)

    def gather(self, value: Value) -> list[Value]:
        """The values of all processes, by rank.

        Raises:
            EntroLLMError: a process has ended.
        """
        return [self._value_of(rank, value) for rank in range(self.size)]

    def _value_of(self, rank: int, value: Value) -> Value:
        mine = rank == self.rank
        content = np.frombuffer(pickle.dumps(value) if mine else b"", np.uint8)
        size = torch.tensor(len(content))
        self._send(size, rank)
        found = torch.from_numpy(content.copy()) if mine else torch.empty(int(size), dtype=torch.uint8)
        self._send(found, rank)
        given: Value = value if mine else pickle.loads(found.numpy().tobytes())
        return given

    def _send(self, tensor: Tensor, rank: int) -> None:
        self._wait(lambda: distributed.broadcast(tensor, rank, async_op=True))

    def _wait(self, start: Callable[[], Any]) -> None:
        """Start an exchange and wait for its end."""

        def run() -> None:
            work = start()
            eager = time.monotonic() + _EAGER_S
            while not work.is_completed():
                time.sleep(0 if time.monotonic() < eager else _PAUSE_S)
            work.wait()

        self._named(run)

    def _named(self, exchange: Callable[[], None]) -> None:
        try:
            exchange()
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            lost = f"process {self.rank} of {self.size} lost the connection to the others"
            raise EntroLLMError(f"{lost}: {error}") from None

    def _check_gpus(self, count: int) -> None:
        if count < self.neighbors:
            raise UnsupportedError(
                f"torchrun started {self.neighbors} processes on this machine, where torch finds "
                f"{count} GPU{'s' * (count != 1)}; each process needs its own: use --nproc-per-node {count}"
            )


def _tensor(array: Any) -> Tensor:
    return torch.from_numpy(array) if isinstance(array, np.ndarray) else array
