"""What quantized layers do to the inputs of those after them, and how a matrix makes up for it before it is rounded.

With x the inputs of a matrix W in the original model and x' those that the layers quantized so far give it, the outputs
that W' gives of x' are closest to those that W gave of x for W' = W E[x x'^T] E[x' x'^T]^-1 (Qronos, arXiv 2505.11695;
WaterSIC, arXiv 2603.04956). A matrix that writes to the residual stream can make up for the error of what it adds to as
well. All of that would fit the calibration text too closely, so the correction is a part of it, and drawn to zero by a
ridge.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from entrollm.arrays import HOST, Array, Device
from entrollm.calibrate import products
from entrollm.calibrate.inputs import batches, model_inputs
from entrollm.calibrate.lockstep import Call, Lockstep, RunHere, pause
from entrollm.calibrate.network import Matrix, Network
from entrollm.calibrate.watch import Stream, Streams, Watch
from entrollm.checkpoint.model_folder import Checkpoint
from entrollm.errors import EntroLLMError, UnsupportedError
from entrollm.processes import Group, share
from entrollm.torch.device import TorchDevice

# The part of the correction that is applied, and the ridge over the mean square of an input.
_TRUST = 0.6
_RIDGE = 0.2

Weights = Callable[[], Array]
Stop = tuple[str, list[Call], list[Call]]
"""A matrix, and the products with it that all windows wait for: in the original model and in the quantized one."""


class DriftWalk:
    """What the quantized matrices of a model do to the inputs of those after them; see `compress.statistics.Drift`.

    Memory: for all windows and both models, what a layer holds while it runs, and two layers in float32.

    Args:
        checkpoint: the model.
        windows: token ids, shape (windows, tokens).
        streams: the matrices that can be corrected, and what their outputs are added to, if anything is known of it.
        device: what computes. Processes that share it walk together, each with a part of the windows: the others ask
            for the corrections that the first one asks for, and get none.
        repeated: the matrices that are multiplied with in several places; none of those that can be corrected.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        windows: NDArray[np.int64],
        streams: Mapping[str, Stream | None],
        device: Device = HOST,
        repeated: frozenset[str] = frozenset(),
    ) -> None:
        self._group = device.group
        self._is_host = not isinstance(device, TorchDevice)
        self._streams = streams
        place = device if isinstance(device, TorchDevice) else TorchDevice("cpu")
        self._models = _Models(checkpoint, windows, streams, place, repeated, self._group)
        self._stops = self._models.walk()
        self._last: tuple[Tensor, Tensor, Tensor] | None = None
        self._current: tuple[str, Array | None] = "", None

    def correction(self, name: str) -> Array | None:
        """What is added to a matrix before it is rounded: float32, its shape; None for nothing.

        The first of several processes asks, and `follow` lets the others do the same.

        Raises:
            EntroLLMError: activations of the quantized model are not finite.
            FormatError: a tensor is missing or has the wrong shape.
            UnsupportedError: the layers depend on the text.
            ValueError: matrices are not asked for in the order of a forward pass.
        """
        if name not in self._streams:
            return None
        if name != self._current[0]:  # the last matrix is asked for again and again, until the size fits
            if self._group.rank == 0:
                self._group.from_first(("correct", name))
            with products.rounded(self._models.original.place):
                found = next((stop for stop in self._stops if stop[0] == name), None)
                if found is None:
                    raise ValueError(f"{name}: not a matrix of a layer, or matrices after it were asked for before")
                correction = self._solve(*found)
            self._current = name, correction.cpu().numpy() if self._is_host and correction is not None else correction
        return self._current[1]

    def record(self, name: str, weights: Weights) -> None:
        """Take note of what a matrix has become, to be read when the walk passes it; else it counts as unchanged."""
        self._models.recorded[name] = weights

    def _solve(self, name: str, original: list[Call], quantized: list[Call]) -> Tensor | None:
        is_transposed = original[0].args[2]
        weight = self._models.original.views[name]
        by_outputs = weight if is_transposed else weight.T
        if self._streams[name] is None:
            shared, moments, drift = self._sums(original, quantized)
            self._last = shared, moments, drift
            wanted = by_outputs.double().T @ drift
        else:
            moments, wanted = _output_sums(by_outputs, original, quantized)
            self._group.sum(moments)
            self._group.sum(wanted)
        if self._group.rank:
            return None
        if not (torch.isfinite(moments).all() and torch.isfinite(wanted).all()):
            raise EntroLLMError(f"{name}: its inputs in the quantized model are not finite")
        mean = float(torch.trace(moments)) / len(moments)
        # Where all inputs are dead, so is the drift.
        moments = moments + torch.diag(torch.full_like(moments[0], _RIDGE * mean if mean > 0 else 1.0))
        whole = (_TRUST * torch.cholesky_solve(wanted.T, torch.linalg.cholesky(moments))).float()
        return whole if is_transposed else whole.T.contiguous()

    def _sums(self, original: list[Call], quantized: list[Call]) -> tuple[Tensor, Tensor, Tensor]:
        """Over all tokens, in float64: x' x'^T and (x - x') x'^T; matrices on one input share them."""
        first: Tensor = quantized[0].args[0]
        if self._last is not None and self._last[0] is first:
            return self._last
        self._last = None
        moments = drift = torch.zeros((), dtype=torch.float64, device=first.device)
        for before, now in zip(original, quantized, strict=True):
            x, y = _rows(before.args[0]), _rows(now.args[0])
            moments = moments + products.moments(y).double()
            drift = drift + products.estimate(x - y, y).double()
        self._group.sum(moments)
        self._group.sum(drift)
        return first, moments, drift


def _output_sums(weight: Tensor, original: list[Call], quantized: list[Call]) -> tuple[Tensor, Tensor]:
    """Over all tokens, in float64: x' x'^T, and e x'^T, where e is the error of the stream that W x is added to.

    Args:
        weight: float32, shape (inputs, outputs).
        original, quantized: the products.
    """
    moments = wanted = torch.zeros((), dtype=torch.float64, device=weight.device)
    for before, now in zip(original, quantized, strict=True):
        y = _rows(now.args[0])
        errors = (_rows(before.args[0]) - y) @ weight
        if before.args[3] is not None and now.args[3] is not None:
            errors += _rows(before.args[3] - now.args[3])
        moments = moments + products.moments(y).double()
        wanted = wanted + products.estimate(errors, y).double()
    return moments, wanted


class _Models:
    """A model, and beside it what its matrices have become, on their way through windows of text."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        windows: NDArray[np.int64],
        streams: Mapping[str, Stream | None],
        device: TorchDevice,
        repeated: frozenset[str],
        group: Group,
    ) -> None:
        self.original, self._quantized = (Network(checkpoint, device) for _ in range(2))
        self.recorded: dict[str, Weights] = {}
        self._device = device
        self._group = group
        self._streams = streams
        self._repeated = repeated
        self._kept: dict[str, Weights] = {}
        self._batches = share(batches(windows, self.original.model, processes=group.size), group)

    def walk(self) -> Iterator[Stop]:
        """The matrices that can be corrected one after another, once all windows of both models have got there."""
        self._apply(self._quantized.views)
        networks = (self.original, self._quantized)
        watchers = [[_Pauser(self) for _ in self._batches] for network in networks]
        walks = [
            Lockstep(network.layers, network.names, repeats=True).run(
                [partial(self._go, network, watcher, ids) for watcher, ids in zip(row, self._batches, strict=True)]
            )
            for network, row in zip(networks, watchers, strict=True)
        ]
        layer: int | None = None
        for (stop, original), (other, quantized) in zip(*walks, strict=True):
            if stop != other:
                raise UnsupportedError(f"the quantized model goes another way than the original: {other}, not {stop}")
            if isinstance(stop, str):
                yield stop, original, quantized
                self._apply([stop, *self._uncorrected()])
                for call in (*original, *quantized):
                    call.result = call.args[1]()
                continue
            for network, calls, row in zip(networks, (original, quantized), watchers, strict=True):
                if layer is not None:
                    network.release(layer)
                network.load(stop)
                for call in calls:
                    call.result = RunHere(row[call.batch].streams.enter)
            # Where a layer comes again, its matrices are the original's until they are made the recorded ones again.
            self.recorded |= {name: self._kept[name] for name in self._kept.keys() & self._quantized.views.keys()}
            self._apply(self._uncorrected())
            layer = stop

    def stream(self, name: str) -> Stream | None:
        """What the outputs of a matrix are added to."""
        return self._streams[name]

    def is_corrected(self, matrix: Matrix) -> bool:
        """Whether the walk stops at a matrix."""
        return not matrix.stack and matrix.pieces[0].name in self._streams

    def _uncorrected(self) -> list[str]:
        """The loaded matrices that the walk does not stop at."""
        return [name for name in self._quantized.views if name not in self._streams]

    def _apply(self, names: Iterable[str]) -> None:
        """Give the quantized model matrices as the first process has recorded them."""
        for name in self._group.from_first([name for name in names if name in self.recorded]):
            view = self._quantized.views[name]
            recorded = self.recorded.pop(name, None)
            if recorded is not None and name in self._repeated:
                self._kept[name] = recorded
            found = torch.empty(view.shape, device=view.device) if recorded is None else recorded()
            weights = found if isinstance(found, Tensor) else self._device.put(found)
            self._group.broadcast(weights)
            view.copy_(weights)

    def _go(self, network: Network, watcher: _Pauser, ids: NDArray[np.int64]) -> None:
        with torch.no_grad(), Watch(network, watcher):
            network.model(**model_inputs(network, ids, predicts=True))


class _Pauser:
    """Stops at the products with matrices that can be corrected."""

    def __init__(self, models: _Models) -> None:
        self.streams = Streams()
        self._models = models

    def product(self, matrix: Matrix, x: Tensor, is_transposed: bool, multiply: Callable[[], Tensor]) -> Tensor:
        """Stop before a product."""
        if not self._models.is_corrected(matrix):
            return multiply()
        name = matrix.pieces[0].name
        stream = self.streams.tensor(self._models.stream(name))
        y: Tensor = pause(name, x, multiply, is_transposed, stream)
        self.streams.product(name, y)
        return y

    def look_up(self, matrix: Matrix, ids: Tensor, rows: Tensor) -> None:
        """Do nothing."""

    def add(self, first: Tensor, second: Tensor, total: Tensor) -> None:
        """Follow the streams."""
        self.streams.add(first, second, total)


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])
