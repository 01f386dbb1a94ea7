"""Measure a model whose layers cannot be run one at a time: all of it is in memory, and autograd goes through it.

Such models run a layer several times, use matrices in several layers, or hand keys and values from layer to layer
beside their hidden states. The sums are those of `walk.py`. A matrix that is used several times has one gradient for
each window, the sum over its uses, and the squares of that are added up. So that the sums fit the memory, matrices are
taken in as many passes over the windows as they need; the labels are the same in each.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from entrollm.calibrate import products
from entrollm.calibrate.inputs import model_inputs, predictions
from entrollm.calibrate.joined import join
from entrollm.calibrate.network import Matrix, Network
from entrollm.calibrate.seen import Seen, Watcher
from entrollm.calibrate.store import StoredStatistics
from entrollm.calibrate.survey import load_whole, matrix_key
from entrollm.calibrate.tally import Batch, Tally, finite_totals, gradient_batches
from entrollm.calibrate.walk import Progress
from entrollm.calibrate.watch import Watch
from entrollm.checkpoint.model_folder import Checkpoint
from entrollm.errors import UnsupportedError
from entrollm.torch.device import TorchDevice


def measure_whole(
    checkpoint: Checkpoint,
    windows: NDArray[np.int64],
    stored: StoredStatistics,
    device: TorchDevice,
    progress: Progress | None = None,
    *,
    why: str = "",
    tunes: bool = False,
) -> None:
    """Measure a model that is in memory as a whole.

    Memory: its float32 weights, what autograd keeps of a batch of windows, at least one, and 16 bytes x columns^2 for
    each matrix of a pass.

    Args:
        checkpoint: the model.
        windows: token ids, shape (windows, tokens).
        stored: where the statistics go.
        device: what computes.
        progress: called after each batch of each pass with those done and in all.
        why: the reason, for errors.
        tunes: whether the model must also have room for `Student`, which tunes it later.
    Raises:
        EntroLLMError: the model does not fit the memory, or activations or gradients are not finite.
        UnsupportedError: the model does not read text, or uses a matrix in a way that is not followed.
    """
    group = stored.device.group
    network, survey, memory = load_whole(checkpoint, windows, device, why, for_tuning=tunes)
    passes = max(group.gather(survey.passes(memory)), key=len)  # of the process with the least memory
    room = memory.left - max(sum(survey.sums[key] for key in keys) for keys in passes)
    parts = gradient_batches(windows, network, group, min(group.gather(1 + room // max(1, survey.window_bytes))))
    paths = _Paths(network.layers)
    for number, keys in enumerate(passes):
        watcher, tally = _WholeWatcher(keys), Tally(network, stored)
        for done, part in enumerate(parts, 1):
            _read(network, part, watcher, tally)
            paths.end()
            if progress is not None:
                progress(number * len(parts) + done, len(passes) * len(parts))
        join(watcher, network, group)
        tally.join()
        totals = finite_totals(watcher)
        tally.unseen(watcher)
        tally.keep(watcher, totals, watcher.tokens)
    stored.add_order(survey.order)
    if len(set().union(*group.gather(paths.taken))) == 1:  # else there is no walk through two models side by side
        stored.streams = {name: survey.streams.found.get(name) for name in survey.single}
    stored.repeated = frozenset(survey.repeated)


def _read(network: Network, batch: Batch, watcher: Watcher, tally: Tally) -> None:
    """Run the model on a batch, and the gradient of a loss back."""
    watcher.windows = len(batch.ids)
    with torch.set_grad_enabled(batch.has_gradient), Watch(network, watcher):
        outputs = network.model(**model_inputs(network, batch.ids, predicts=batch.has_gradient))
        if batch.has_gradient:
            loss = tally.loss(predictions(outputs), batch.numbers)
            with products.rounded(network.place):
                loss.backward()  # type: ignore[no-untyped-call]
        watcher.forget()


class _WholeWatcher(Watcher):
    """Adds up what some matrices see; the gradient of one is the sum over its uses.

    Args:
        keys: of the matrices.
    """

    def __init__(self, keys: set[str]) -> None:
        super().__init__(adds_inputs=True)
        self._keys = keys
        self._uses: dict[str, int] = {}
        self._waiting: dict[str, list[tuple[Tensor, Tensor]]] = {}

    def product(self, matrix: Matrix, x: Tensor, is_transposed: bool, multiply: Callable[[], Tensor]) -> Tensor:
        """See one product."""
        if matrix_key(matrix) not in self._keys:
            return multiply()
        name = matrix.pieces[0].name
        seen = self.seen.get(name)
        if seen is not None and seen.group != name and (self._last is None or self._last[0] is not x):
            raise UnsupportedError(
                f"{name}: it has the inputs of {seen.group} in one place and others in another, which calibration does "
                "not follow; compress the model without it"
            )
        y = super().product(matrix, x, is_transposed, multiply)
        if y.requires_grad:
            self._uses[name] = self._uses.get(name, 0) + 1
        return y

    def look_up(self, matrix: Matrix, ids: Tensor, rows: Tensor) -> None:
        """See rows that are looked up."""
        if matrix_key(matrix) in self._keys:
            super().look_up(matrix, ids, rows)

    def forget(self) -> None:
        """Add the gradients of matrices that not all uses have given any, and let go of what was seen last."""
        for name in list(self._waiting):
            self._add_up(name)
        self._uses.clear()
        super().forget()

    def _add_gradient(self, seen: Seen, x: Tensor, dy: Tensor) -> None:
        name = seen.matrix.pieces[0].name
        self._waiting.setdefault(name, []).append((x, dy))
        if len(self._waiting[name]) == self._uses[name]:
            self._add_up(name)

    def _add_up(self, name: str) -> None:
        uses = self._waiting.pop(name)
        if len({len(x) for x, _ in uses}) > 1:  # one that belongs to no window
            uses = [(x.reshape(1, -1, x.shape[-1]), dy.reshape(1, -1, dy.shape[-1])) for x, dy in uses]
        # The sum of products is the product of their factors one after the other.
        x, dy = (torch.cat(parts, 1) if len(parts) > 1 else parts[0] for parts in zip(*uses, strict=True))
        super()._add_gradient(self.seen[name], x, dy)


class _Paths:
    """The layers that batches go through.

    Attributes:
        taken: their numbers, one after another, for each way that a batch has gone.
    """

    def __init__(self, layers: Sequence[nn.Module]) -> None:
        self.taken: set[tuple[int, ...]] = set()
        self._current: list[int] = []
        for index, layer in enumerate(layers):
            layer.register_forward_pre_hook(partial(self._pass, index))

    def end(self) -> None:
        """A batch is through."""
        self.taken.add(tuple(self._current))
        self._current.clear()

    def _pass(self, index: int, layer: nn.Module, args: tuple[Any, ...]) -> None:
        self._current.append(index)
