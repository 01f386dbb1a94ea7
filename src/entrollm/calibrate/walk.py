"""Measure what the matrices of a model see of a text, and how much their errors matter.

All windows go through one layer after another, so that the weights of one layer are in memory at once. The first pass
runs windows of text forward and adds up x x^T over the inputs x of every matrix. The second takes labels that the model
itself finds likely and passes the gradient of their loss back: each layer is run again, and autograd gives the
gradients of its inputs and of the outputs of its matrices. The squares of the gradient G of every matrix are added up
over windows: with such labels they are the second derivative of the KL divergence, so that a white error of variance v
costs v / 2 times their sum, and G^T G weighs errors by column as x x^T does, with the sensitivity of the outputs
counted in.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from entrollm.arrays import double
from entrollm.calibrate import products
from entrollm.calibrate.inputs import model_inputs, predictions
from entrollm.calibrate.joined import join
from entrollm.calibrate.lockstep import Call, Lockstep
from entrollm.calibrate.network import Network
from entrollm.calibrate.seen import Watcher
from entrollm.calibrate.store import Spool, StoredStatistics
from entrollm.calibrate.tally import Batch, Tally, finite_totals, gradient_batches
from entrollm.calibrate.visit import Visit
from entrollm.calibrate.watch import Watch

Progress = Callable[[float, float], None]


def walk(
    network: Network,
    windows: NDArray[np.int64],
    stored: StoredStatistics,
    spool: Spool,
    progress: Progress | None = None,
) -> None:
    """Measure a model one layer at a time; see `measure`.

    Args:
        network: the model.
        windows: token ids, shape (windows, tokens).
        stored: where the statistics go.
        spool: where hidden states and moments wait.
        progress: called after each layer of each pass with those done and in all.
    Raises:
        EntroLLMError: activations or gradients are not finite.
        UnwalkableError: the model's layers cannot be run one at a time. Nothing has been stored but an order.
    """
    network.check_apart()
    _Walk(network, windows, stored, spool).run(progress)


class _Walk:
    def __init__(self, network: Network, windows: NDArray[np.int64], stored: StoredStatistics, spool: Spool) -> None:
        self._network = network
        self._stored = stored
        self._spool = spool
        self._group = stored.device.group
        self._batches = gradient_batches(windows, network, self._group)
        self._tally = Tally(network, stored)
        self._glue = Watcher(adds_inputs=True)
        self._tokens: dict[str, int] = {}

    def run(self, progress: Progress | None) -> None:
        """Both passes."""
        layers = self._network.layers
        lockstep = Lockstep(layers, self._network.names)
        try:
            visits: list[tuple[int, list[Visit]]] = []
            for index, calls in lockstep.run([partial(self._go, batch) for batch in self._batches]):
                assert isinstance(index, int)
                self._stored.add_order(self._glue.names())
                visits.append((index, self._forward(lockstep, index, calls)))
                if progress is not None:
                    progress(len(visits), 2 * len(layers))
            self._stored.add_order(self._glue.names())
            self._stored.streams |= {name: None for name, seen in self._glue.seen.items() if not seen.is_looked_up}
            self._tally.join()
            done = len(visits)
            while visits:
                with products.rounded(self._network.place):
                    self._backward(lockstep, *visits.pop())
                if progress is not None:
                    progress(2 * done - len(visits), 2 * done)
        finally:
            lockstep.close()
        join(self._glue, self._network, self._group)
        totals = {name: moments.total() for name, moments in self._glue.moments.items()}
        self._tally.keep(self._glue, totals, self._glue.tokens)

    def _go(self, batch: Batch) -> None:
        """Run the model on a batch, and the gradient of a loss back to the last layer."""
        inputs = model_inputs(self._network, batch.ids, predicts=batch.has_gradient)
        if not batch.has_gradient:
            with torch.no_grad():
                self._network.model(**inputs)
            return
        with torch.enable_grad(), Watch(self._network, self._glue):
            outputs = self._network.model(**inputs)
            self._glue.windows = len(batch.ids)
            loss = self._tally.loss(predictions(outputs), batch.numbers)
            loss.backward()  # type: ignore[no-untyped-call]
            self._glue.forget()

    def _forward(self, lockstep: Lockstep, index: int, calls: list[Call]) -> list[Visit]:
        """Run a layer on all batches."""
        self._network.load(index)
        watcher = Watcher(adds_inputs=True)
        layer = partial(_call, lockstep, index, watcher)
        visits = []
        with Watch(self._network, watcher):
            for call in calls:
                if self._batches[call.batch].has_gradient:
                    visits.append(Visit(call, f"{index}-{call.batch}", self._spool))
                    call.result = visits[-1].forward(layer)
                else:
                    with torch.no_grad():
                        call.result = layer(*call.args, **call.kwargs)
                watcher.forget()
        join(watcher, self._network, self._group)
        self._put_moments(index, watcher)
        self._stored.add_order(watcher.names())
        self._stored.streams |= {
            name: watcher.streams.found.get(name) for name, seen in watcher.seen.items() if not seen.matrix.stack
        }
        self._network.release(index)
        return visits

    def _put_moments(self, index: int, watcher: Watcher) -> None:
        """Let the moments of a layer wait, those of members of a stack together with those of all members."""
        totals = finite_totals(watcher)
        for group, total in totals.items() if self._group.rank == 0 else ():
            self._spool.put_triangle(f"{index}-{group}", total)
        self._tokens |= watcher.tokens

    def _backward(self, lockstep: Lockstep, index: int, visits: list[Visit]) -> None:
        """Run a layer again with gradients, and keep the statistics of its matrices."""
        self._network.load(index)
        watcher = Watcher(adds_inputs=False)
        layer = partial(_call, lockstep, index, watcher)
        with Watch(self._network, watcher):
            for visit in visits:
                watcher.windows = self._glue.windows = len(self._batches[visit.batch].ids)
                visit.backward(layer)
                watcher.forget()
        join(watcher, self._network, self._group)
        if self._group.rank == 0:
            self._keep_layer(index, watcher)
        self._network.release(index)

    def _keep_layer(self, index: int, watcher: Watcher) -> None:
        """Keep the statistics of the matrices of a layer."""
        waiting = {seen.group: seen.matrix.shape[1] for seen in watcher.seen.values()}
        waiting |= {name: matrix.shape[1] for name, matrix in self._tally.unseen(watcher).items()}
        totals = {
            group: double(self._spool.take_triangle(f"{index}-{group}", size))
            for group, size in waiting.items()
            if group in self._tokens
        }
        totals |= {group: moments.total() for group, moments in watcher.moments.items()}
        self._tally.keep(watcher, totals, self._tokens | watcher.tokens)


def _call(lockstep: Lockstep, index: int, watcher: Watcher, *args: Any, **kwargs: Any) -> Any:
    watcher.streams.enter(args, kwargs)
    return lockstep.forward(index, args, kwargs)
