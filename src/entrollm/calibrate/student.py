"""A model and what compression made of it, as they read windows of text: their divergence, and its gradients.

Both run through one layer at a time, as in `walk.py`. The weights of the compressed model are parameters of
transformers' own code, so autograd gives the gradients of its matrices whatever the layers do with them. Gradients of
a model that cannot be walked go through all of it at once, as in `whole.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from entrollm.calibrate.inputs import batches, model_inputs, predictions
from entrollm.calibrate.lockstep import Lockstep, UnwalkableError
from entrollm.calibrate.network import Network
from entrollm.calibrate.scales import Floats, MovingScales
from entrollm.calibrate.store import Spool
from entrollm.calibrate.survey import load_whole
from entrollm.calibrate.visit import Visit
from entrollm.checkpoint.model_folder import Checkpoint
from entrollm.errors import EntroLLMError
from entrollm.format import layout
from entrollm.torch.device import TorchDevice

Gradients = Mapping[str, Floats]
"""Gradients of the logarithms of scales, float32, by entry of the file."""


class Student:
    """A compressed model that reads windows beside its original.

    Memory: for each of the two, the float32 weights outside the layers and of one layer; gradients take as much again.
    Of a compressed model that cannot be walked, all weights with their gradients, and what autograd keeps of a window.

    Args:
        checkpoint: the original.
        scales: the compressed model.
        spool: where the original's predictions and the inputs of layers wait.
        device: what computes.
    """

    def __init__(self, checkpoint: Checkpoint, scales: MovingScales, spool: Spool, device: TorchDevice) -> None:
        self._checkpoint = checkpoint
        self._original, self._network = (Network(checkpoint, device) for _ in range(2))
        self._is_whole = False
        self._scales = scales
        self._spool = spool
        self._device = device
        self._outer = list(self._network.views)
        _require(parameter for parameter in self._network.model.parameters() if not parameter.is_meta)

    def divergence(self, windows: NDArray[np.int64], gradients: Gradients | None = None) -> float:
        """The mean KL divergence from the original over windows, in nats.

        Args:
            windows: token ids, shape (windows, tokens).
            gradients: what the gradients are added to, with the shapes of `MovingScales.values`; None if unwanted.
        Raises:
            EntroLLMError: the divergence is not finite, or the model does not fit the memory.
        """
        if gradients is None:
            return float(self.compare(windows)[0].mean())
        parts = batches(windows, self._original.model, 1 if self._is_whole else None)
        self._teach(parts)
        try:
            return max(0.0, _check(self._follow(parts, windows.size, gradients)))  # rounding may take 0 below it
        except UnwalkableError as error:
            why = str(error)
        # The error, and with it all that was in memory, is gone by now.
        self._take_whole(windows, why)
        return self.divergence(windows, gradients)

    def _take_whole(self, windows: NDArray[np.int64], why: str) -> None:
        """Load all layers of the compressed model."""
        self._spool.clear()
        del self._network
        self._network, *_ = load_whole(self._checkpoint, windows, self._device, why, for_tuning=True)
        self._is_whole = True
        self._outer = list(self._network.views)
        _require(self._network.model.parameters())

    def compare(self, windows: NDArray[np.int64]) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
        """The KL divergence of each prediction from the original's, in nats, and whether both have one likeliest token.

        Args:
            windows: token ids, shape (windows, tokens).
        Returns:
            Both have the shape of the windows.
        Raises:
            EntroLLMError: a divergence is not finite.
        """
        parts = batches(windows, self._original.model)
        self._teach(parts)
        found: list[tuple[Tensor, Tensor]] = []

        def go(number: int) -> None:
            with torch.no_grad():
                predicted = _log_probabilities(self._network, parts[number])
                wanted = self._spool.take(_wanted(number))
                found.append((_divergences(wanted, predicted), wanted.argmax(-1) == predicted.argmax(-1)))

        self._put(self._outer)
        self._forward(self._network, self._load, [partial(go, number) for number in range(len(parts))])
        divergences, agreements = (
            self._device.take(torch.cat(kind)).reshape(windows.shape) for kind in zip(*found, strict=True)
        )
        _check(float(divergences.sum()))
        return np.maximum(divergences, 0.0), agreements

    def _teach(self, parts: list[NDArray[np.int64]]) -> None:
        """Leave the original's predictions in the spool."""
        network = self._original

        def go(number: int) -> None:
            with torch.no_grad():
                self._spool.put(_wanted(number), _log_probabilities(network, parts[number]))

        self._forward(network, network.load, [partial(go, number) for number in range(len(parts))])

    def _forward(self, network: Network, load: Callable[[int], None], runs: Sequence[Callable[[], None]]) -> None:
        """Run batches through the layers of a model, without gradients."""
        if self._is_whole and network is self._network:
            for run in runs:
                run()
            return
        lockstep = Lockstep(network.layers, network.names, repeats=True)
        try:
            for index, calls in lockstep.run(runs):
                assert isinstance(index, int)
                load(index)
                with torch.no_grad():
                    for call in calls:
                        call.result = lockstep.forward(index, call.args, call.kwargs)
                network.release(index)
        finally:
            lockstep.close()

    def _follow(self, parts: list[NDArray[np.int64]], predicted: int, gradients: Gradients) -> float:
        """The divergence of the compressed model from the predictions in the spool, and its gradients."""
        network = self._network
        found: list[float] = []

        def go(number: int) -> None:
            with torch.enable_grad():
                logs = _log_probabilities(network, parts[number])
                divergence = _divergences(self._spool.take(_wanted(number)), logs).sum() / predicted
                found.append(float(divergence.detach()))
                divergence.backward()  # type: ignore[no-untyped-call]

        self._put(self._outer)
        runs = [partial(go, number) for number in range(len(parts))]
        if self._is_whole:
            for run in runs:
                run()
        else:
            self._walk(runs, gradients)
        self._gather(self._outer, gradients)
        network.model.zero_grad()
        return math.fsum(found)

    def _walk(self, runs: Sequence[Callable[[], None]], gradients: Gradients) -> None:
        """Run batches through the layers of the compressed model, and gradients back."""
        network = self._network
        network.check_apart()
        lockstep = Lockstep(network.layers, network.names)
        try:
            visits: list[tuple[int, list[Visit]]] = []
            for index, calls in lockstep.run(runs):
                assert isinstance(index, int)
                self._load(index)
                visits.append((index, [Visit(call, f"{index}-{call.batch}", self._spool) for call in calls]))
                for call, visit in zip(calls, visits[-1][1], strict=True):
                    call.result = visit.forward(partial(_call, lockstep, index))
                network.release(index)
            while visits:
                index, layer_visits = visits.pop()
                self._load(index)
                for visit in layer_visits:
                    visit.backward(partial(_call, lockstep, index))
                self._gather(set(network.views) - set(self._outer), gradients)
                network.release(index)
        finally:
            lockstep.close()

    def _load(self, index: int) -> None:
        """Load a layer of the compressed model."""
        self._network.load(index)
        _require(self._network.layers[index].parameters())
        self._put(set(self._network.views) - set(self._outer))

    def _put(self, names: Iterable[str]) -> None:
        """Put matrices with their present scales in place of the original's."""
        for name in names:
            if name in self._scales.names:
                self._network.views[name].copy_(self._device.put(self._scales.weight(name)))

    def _gather(self, names: Iterable[str], gradients: Gradients) -> None:
        """Add what the gradients of loaded matrices say of their scales."""
        for name in names:
            gradient = self._network.gradient(name)
            if gradient is None:
                continue
            products = self._network.views[name] * gradient
            for suffix, axis in ((layout.SCALE, 1), (layout.COLUMN_SCALE, 0)):
                if name + suffix in gradients:
                    gradients[name + suffix][...] += self._device.take(products.sum(axis))


def _require(parameters: Iterable[Tensor]) -> None:
    for parameter in parameters:
        parameter.requires_grad_()


def _call(lockstep: Lockstep, index: int, *args: Any, **kwargs: Any) -> Any:
    return lockstep.forward(index, args, kwargs)


def _log_probabilities(network: Network, ids: NDArray[np.int64]) -> Tensor:
    """float32 (predictions, vocabulary)."""
    outputs = network.model(**model_inputs(network, ids, predicts=True))
    return torch.log_softmax(predictions(outputs).float().flatten(0, -2), -1)


def _divergences(wanted: Tensor, found: Tensor) -> Tensor:
    """KL divergences, float64 (predictions,), of log-probabilities (predictions, vocabulary)."""
    divergences: Tensor = (wanted.exp() * (wanted - found)).sum(-1, dtype=torch.float64)
    return divergences


def _check(divergence: float) -> float:
    if not math.isfinite(divergence):
        raise EntroLLMError("the divergence of the compressed model is not finite; its weights may be damaged")
    return divergence


def _wanted(number: int) -> str:
    return f"wanted-{number}"
