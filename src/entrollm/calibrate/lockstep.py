"""Batches that go through a model side by side, so that each of its layers is needed once.

A model's own code decides what happens between layers: masks, positions, second stacks, caches of its own making. So
that it need not be repeated here, every batch runs that code in a thread of its own, which stops at each layer until
the caller has run the layer for it. Such a run may also stop elsewhere, by `pause`. One thread runs at a time.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from entrollm.errors import UnsupportedError

_LOCAL = threading.local()


class UnwalkableError(UnsupportedError):
    """The layers of a model cannot be run one at a time."""


@dataclass
class Call:
    """A layer that a batch has arrived at, or another place.

    Attributes:
        batch: its number.
        args, kwargs: what the layer is called with, or what was given to `pause`.
        result: what it returns, or a `RunHere`; to be set before the iteration goes on.
    """

    batch: int
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    result: Any = field(default=None)


@dataclass(frozen=True)
class RunHere:
    """Lets the thread of a batch run the layer itself.

    Attributes:
        enter: called first, with the arguments of the layer.
    """

    enter: Callable[[tuple[Any, ...], dict[str, Any]], None]


def pause(name: str, *args: Any) -> Any:
    """In the thread of a batch: stop until the caller has set a result, and return it."""
    run: _Run = _LOCAL.run
    return run.wait(name, Call(run.number, args, {}))


class Lockstep:
    """Runs of a model that stop at its layers.

    Args:
        layers: the layers of the model; their `forward` is replaced until `close`.
        names: of the layers, for errors.
        repeats: whether batches may arrive at a layer several times.
    """

    def __init__(self, layers: Sequence[nn.Module], names: Sequence[str], *, repeats: bool = False) -> None:
        self._layers = layers
        self._names = names
        self._repeats = repeats
        self._forwards: list[Callable[..., Any]] = [layer.forward for layer in layers]
        for index, layer in enumerate(layers):
            layer.forward = _Stop(index, layer.forward)

    def forward(self, index: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What a layer computes."""
        return self._forwards[index](*args, **kwargs)

    def close(self) -> None:
        """Give the layers their `forward` back."""
        for layer, forward in zip(self._layers, self._forwards, strict=True):
            layer.forward = forward

    def run(self, batches: Sequence[Callable[[], None]]) -> Iterator[tuple[int | str, list[Call]]]:
        """Run batches, each of which calls the model, and stop where all of them have arrived at a layer or a pause.

        Raises:
            UnwalkableError: batches arrive at different layers, or at a layer for the second time.
        """
        runs = [_Run(number, work) for number, work in enumerate(batches)]
        passed: set[int | str] = set()
        try:
            while True:
                for run in runs:
                    run.advance()
                stops = {run.stop for run in runs}
                if stops == {None}:
                    return
                if len(stops) > 1:
                    found = ", ".join(sorted(self._describe(stop) for stop in stops))
                    raise UnwalkableError(f"the layers that run depend on the text: {found}")
                (stop,) = stops
                assert stop is not None
                if stop in passed and not self._repeats:
                    raise UnwalkableError(f"{self._describe(stop)}: the model runs it more than once")
                passed.add(stop)
                yield stop, [run.call for run in runs if run.call is not None]
        finally:
            for run in runs:
                run.cancel()

    def _describe(self, stop: int | str | None) -> str:
        return "the end" if stop is None else stop if isinstance(stop, str) else self._names[stop]


class _Cancelled(BaseException):
    """Ends the thread of a run that nobody waits for."""


class _Stop:
    """The `forward` of a layer: waits until the layer has been run."""

    def __init__(self, index: int, forward: Callable[..., Any]) -> None:
        self._index = index
        self._forward = forward

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        run: _Run = _LOCAL.run
        result = run.wait(self._index, Call(run.number, args, kwargs))
        if isinstance(result, RunHere):
            result.enter(args, kwargs)
            return self._forward(*args, **kwargs)
        return result


class _Run:
    """A thread that runs while the caller of `advance` waits."""

    def __init__(self, number: int, work: Callable[[], None]) -> None:
        self.number = number
        self.stop: int | str | None = None
        self.call: Call | None = None
        self._work = work
        self._error: BaseException | None = None
        self._is_cancelled = False
        self._turn, self._pause = threading.Semaphore(0), threading.Semaphore(0)
        self._gpu = torch.cuda.current_device() if torch.cuda.is_initialized() else None  # type: ignore[no-untyped-call]
        self._thread = threading.Thread(target=self._main, daemon=True)

    def advance(self) -> None:
        """Let the thread run until it arrives at a layer or ends, and raise what it raised."""
        if self._thread.ident is None:
            self._thread.start()
        self._turn.release()
        self._pause.acquire()
        if self._error is not None:
            raise self._error

    def wait(self, stop: int | str, call: Call) -> Any:
        """In the thread: stop at a layer."""
        self.stop, self.call = stop, call
        self._pause.release()
        self._turn.acquire()
        if self._is_cancelled:
            raise _Cancelled
        self.stop, self.call = None, None
        return call.result

    def cancel(self) -> None:
        """End the thread."""
        self._is_cancelled = True
        self._turn.release()
        if self._thread.ident is not None:
            self._thread.join()

    def _main(self) -> None:
        self._turn.acquire()
        _LOCAL.run = self
        if self._gpu is not None:
            torch.cuda.set_device(self._gpu)  # threads begin on the first one
        try:
            if not self._is_cancelled:
                self._work()
        except _Cancelled:
            pass
        except BaseException as error:  # raised again where the caller waits
            self._error = error
        self._work = _nothing  # lets go of what it holds
        self._pause.release()


def _nothing() -> None:
    return None
