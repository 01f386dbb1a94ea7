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

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from entrollm.arrays import HOST, Device, double
from entrollm.calibrate import products
from entrollm.calibrate.inputs import batches, model_inputs, predictions, vocabulary
from entrollm.calibrate.joined import check_windows, join
from entrollm.calibrate.lockstep import Call, Lockstep
from entrollm.calibrate.network import Matrix, Network
from entrollm.calibrate.room import room_beside
from entrollm.calibrate.seen import Pools, Seen, Watcher
from entrollm.calibrate.store import Spool, StoredStatistics
from entrollm.calibrate.sums import RARE_TOKEN, draw_labels, mean_moments, random_numbers
from entrollm.calibrate.visit import Visit
from entrollm.calibrate.watch import Watch
from entrollm.checkpoint.model_folder import Checkpoint
from entrollm.errors import EntroLLMError
from entrollm.processes import share
from entrollm.quantize.statistics import Sensitivity, damped_factor
from entrollm.torch.device import TorchDevice

# Windows that gradients are taken of; squares of gradients converge sooner than correlations of inputs.
_GRADIENT_WINDOWS = 64

Progress = Callable[[float, float], None]


def measure(
    checkpoint: Checkpoint,
    windows: NDArray[np.int64],
    folder: Path,
    progress: Progress | None = None,
    device: Device = HOST,
) -> StoredStatistics:
    """Run windows of text through a model and keep what its matrices see, and how much their errors matter.

    Memory: the float32 weights outside the layers and of one layer, the hidden states of all windows, and 16 bytes x
    columns^2 for each matrix of a layer. On disk, or on a GPU that has room for it: the hidden states of at most 64
    windows before each layer, and the statistics, 2 bytes x columns^2 for each matrix.

    Args:
        checkpoint: the model.
        windows: token ids, shape (windows, tokens).
        folder: where the statistics go; an empty folder that outlives the result.
        progress: called after each layer of each pass with those done and in all.
        device: what computes. Where several processes share it, each runs a part of the windows, and the first one
            alone has the statistics of matrices.
    Raises:
        EntroLLMError: activations or gradients are not finite.
        FormatError: a tensor is missing or has another shape.
        UnsupportedError: transformers does not know the model, or its layers cannot be walked.
    """
    place = device if isinstance(device, TorchDevice) else TorchDevice("cpu")
    network = Network(checkpoint, place)
    check_windows(min(len(windows), _GRADIENT_WINDOWS), device.group)
    room = room_beside(network, windows.size, place)
    stored = StoredStatistics(folder, windows, device, room)
    _Measurement(network, windows, stored, Spool(folder, place, room)).run(progress)
    return stored


@dataclass(frozen=True)
class _Batch:
    ids: NDArray[np.int64]
    has_gradient: bool
    # The numbers of its windows among all that have gradients, or that have none.
    numbers: NDArray[np.int64]


class _Measurement:
    def __init__(self, network: Network, windows: NDArray[np.int64], stored: StoredStatistics, spool: Spool) -> None:
        self._network = network
        self._stored = stored
        self._spool = spool
        self._group = stored.device.group
        picked = np.unique(np.linspace(0, len(windows) - 1, min(len(windows), _GRADIENT_WINDOWS)).astype(int))
        others = np.setdiff1d(np.arange(len(windows)), picked)
        self._batches: list[_Batch] = []
        for chosen, has_gradient in ((picked, True), (others, False)):
            found, done = [], 0
            for ids in batches(windows[chosen], network.model, self._group.size):
                found.append(_Batch(ids, has_gradient, np.arange(done, done + len(ids))))
                done += len(ids)
            self._batches += share(found, self._group)
        self._glue = Watcher(adds_inputs=True)
        self._tokens: dict[str, int] = {}
        self._likely: Tensor | None = None
        self._predictions = 0

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
            self._predictions = sum(self._group.gather(self._predictions))
            if self._likely is not None:
                self._group.sum(self._likely)
            done = len(visits)
            while visits:
                with products.rounded(self._network.place):
                    self._backward(lockstep, *visits.pop())
                if progress is not None:
                    progress(2 * done - len(visits), 2 * done)
        finally:
            lockstep.close()
        join(self._glue, self._network, self._group)
        if self._group.rank == 0:
            totals = {name: moments.total() for name, moments in self._glue.moments.items()}
            self._keep(self._glue, totals, self._glue.tokens)

    def _go(self, batch: _Batch) -> None:
        """Run the model on a batch, and the gradient of a loss back to the last layer."""
        inputs = model_inputs(self._network, batch.ids, predicts=batch.has_gradient)
        if not batch.has_gradient:
            with torch.no_grad():
                self._network.model(**inputs)
            return
        with torch.enable_grad(), Watch(self._network, self._glue):
            outputs = self._network.model(**inputs)
            self._glue.windows = len(batch.ids)
            loss = self._loss(predictions(outputs), batch.numbers)
            loss.backward()  # type: ignore[no-untyped-call]
            self._glue.forget()

    def _loss(self, predicted: Tensor, windows: NDArray[np.int64]) -> Tensor:
        """A loss whose gradients have the second derivatives of the divergence as their squares.

        Args:
            predicted: shape (windows, ..., outputs).
            windows: their numbers, which decide the labels.
        """
        flat = predicted.reshape(-1, predicted.shape[-1])
        self._predictions += len(flat)
        if predicted.shape[-1] != vocabulary(self._network.model):
            # Outputs that are no distribution: a Gaussian around them, as wide as they are large in a window.
            outputs = predicted.reshape(len(windows), -1)
            signs = torch.from_numpy(np.sign(random_numbers(windows, outputs.shape[1]) - 0.5)).to(outputs)
            sizes = outputs.detach().square().mean(1).sqrt().clamp_min(1e-20)
            return ((outputs * signs).sum(1) / sizes).sum()
        points = random_numbers(windows, len(flat) // len(windows)).reshape(-1)
        probabilities, labels = draw_labels(flat.detach().float().clone(), points)
        total = probabilities.sum(0, dtype=torch.float64)
        self._likely = total if self._likely is None else self._likely + total
        return functional.cross_entropy(flat.float(), labels, reduction="sum")

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
        totals = {}
        for group, moments in watcher.moments.items():
            totals[group] = moments.total()
            if not torch.isfinite(totals[group]).all():
                raise EntroLLMError(f"{group}: its inputs on the calibration text are not finite")
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
        waiting |= {name: matrix.shape[1] for name, matrix in self._unseen(index, watcher).items()}
        totals = {
            group: double(self._spool.take_triangle(f"{index}-{group}", size))
            for group, size in waiting.items()
            if group in self._tokens
        }
        totals |= {group: moments.total() for group, moments in watcher.moments.items()}
        self._keep(watcher, totals, self._tokens | watcher.tokens)

    def _unseen(self, index: int, watcher: Watcher) -> dict[str, Matrix]:
        """Members of stacks that gradients did not reach."""
        stacks = {seen.matrix.stack for seen in watcher.seen.values()} - {""}
        found = {matrix.pieces[0].name: matrix for matrix in self._network.matrices.values() if matrix.stack in stacks}
        missing = {name: matrix for name, matrix in found.items() if name not in watcher.seen}
        watcher.seen |= {name: Seen(matrix, name) for name, matrix in missing.items()}
        return missing

    def _keep(self, watcher: Watcher, totals: Mapping[str, Tensor], tokens: Mapping[str, int]) -> None:
        """Store the statistics of all matrices that a watcher has seen."""
        pools = Pools(watcher.seen.values(), totals, tokens)
        for seen in reversed(list(watcher.seen.values())):
            for piece in seen.matrix.pieces:
                squares, moments, total = pools.of(seen, piece.name)
                if squares is None:
                    continue
                if not np.isfinite(total):
                    raise EntroLLMError(f"{piece.name}: its gradients on the calibration text are not finite")
                if moments is None or seen.is_looked_up:
                    moments = squares
                factor = damped_factor(mean_moments(squares, moments))
                weight = self._network.views[piece.name]
                share = total / self._predictions / 2 * float(weight.square().mean(dtype=torch.float64))
                self._stored.add(piece.name, factor, Sensitivity(share, self._rows(len(weight))))

    def _rows(self, rows: int) -> NDArray[np.float32] | None:
        """How much each row matters, where rows are tokens."""
        if self._likely is None or rows != len(self._likely):
            return None
        found: NDArray[np.float64] = (self._likely / self._predictions).cpu().numpy()
        found = found + RARE_TOKEN * found.mean()
        relative: NDArray[np.float32] = (found / found.mean()).astype(np.float32)
        return relative


def _call(lockstep: Lockstep, index: int, watcher: Watcher, *args: Any, **kwargs: Any) -> Any:
    watcher.streams.enter(args, kwargs)
    return lockstep.forward(index, args, kwargs)
