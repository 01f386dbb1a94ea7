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
from torch.autograd.graph import saved_tensors_hooks

from entrollm.calibrate import products
from entrollm.calibrate.inputs import model_inputs, predictions
from entrollm.calibrate.network import Matrix, Network
from entrollm.calibrate.seen import Seen, Watcher
from entrollm.calibrate.store import StoredStatistics
from entrollm.calibrate.sums import TOKENS_PER_PRODUCT
from entrollm.calibrate.tally import Batch, Tally, finite_totals, gradient_batches
from entrollm.calibrate.walk import Progress
from entrollm.calibrate.watch import Streams, Watch
from entrollm.checkpoint.model_folder import Checkpoint
from entrollm.errors import EntroLLMError, Message, Option, UnsupportedError
from entrollm.torch.device import TorchDevice

# Of each logit, beside itself: probabilities, their sums, and gradients.
_LOGIT_BYTES = 24


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
    network, survey, memory = load_whole(checkpoint, windows, device, why, for_tuning=tunes)
    passes = survey.passes(memory)
    room = memory.left - max(sum(survey.sums[key] for key in keys) for keys in passes)
    parts = gradient_batches(windows, network, 1 + room // max(1, survey.window_bytes))
    paths = _Paths(network.layers)
    for number, keys in enumerate(passes):
        watcher, tally = _WholeWatcher(keys), Tally(network, stored)
        for done, part in enumerate(parts, 1):
            _read(network, part, watcher, tally)
            paths.end()
            if progress is not None:
                progress(number * len(parts) + done, len(passes) * len(parts))
        totals = finite_totals(watcher)
        tally.unseen(watcher)
        tally.keep(watcher, totals, watcher.tokens)
    stored.add_order(survey.order)
    if len(paths.taken) == 1:  # else there is no walk through two models side by side
        stored.streams = {name: survey.streams.found.get(name) for name in survey.single}
    stored.repeated = frozenset(survey.repeated)


def load_whole(
    checkpoint: Checkpoint, windows: NDArray[np.int64], device: TorchDevice, why: str, *, for_tuning: bool = False
) -> tuple[Network, Survey, Memory]:
    """A model in memory as a whole, what its first window shows, and what is left beside both.

    Args:
        checkpoint: the model.
        windows: token ids, shape (windows, tokens).
        device: where it is loaded.
        why: the reason, for errors.
        for_tuning: whether all weights have gradients.
    Raises:
        EntroLLMError: the model and one window do not fit the memory.
        FormatError: a tensor is missing or has another shape.
        UnsupportedError: the model does not read text.
    """
    memory = Memory(checkpoint, device, why, for_tuning=for_tuning)
    network = Network(checkpoint, device)
    memory.take((8 if for_tuning else 4) * network.weights())
    outer = set(network.views)
    network.load_all()
    survey = Survey(network, windows[:1])
    memory.take(survey.window_bytes)
    for name in outer:
        survey.streams.found.pop(name, None)  # what these are added to is nothing of a layer
    return network, survey, memory


def _read(network: Network, batch: Batch, watcher: Watcher, tally: Tally) -> None:
    """Run the model on a batch, and the gradient of a loss back."""
    ids, has_gradient = batch
    watcher.windows = len(ids)
    with torch.set_grad_enabled(has_gradient), Watch(network, watcher):
        outputs = network.model(**model_inputs(network, ids, predicts=has_gradient))
        if has_gradient:
            loss = tally.loss(predictions(outputs))
            with products.rounded(network.place):
                loss.backward()  # type: ignore[no-untyped-call]
        watcher.forget()


class Memory:
    """What is left of the memory of a device."""

    def __init__(self, checkpoint: Checkpoint, device: TorchDevice, why: str, *, for_tuning: bool) -> None:
        self.left = self._size = device.memory()
        self._path = checkpoint.path
        self._name = device.name
        self._why = why
        self._hint = Message("compress it without {}", Option("tune" if for_tuning else "calibration"))

    def take(self, size_bytes: int) -> None:
        """Take a part.

        Raises:
            EntroLLMError: it is more than what is left.
        """
        self.left -= size_bytes
        if self.left < 0:
            raise EntroLLMError(
                f"{self._path}: calibration cannot take one layer after another ({self._why}), and all layers at once "
                f"need at least {(self._size - self.left) / 1e9:.1f} GB of memory, where {self._name} has "
                f"{self._size / 1e9:.1f} GB",
                hint=self._hint,
            )


class Survey:
    """What one window shows of a model: its products in order, how often each is made, and how much memory they take.

    Attributes:
        window_bytes: what a window takes while autograd holds it.
        sums: bytes of the sums over each matrix, or over each stack.
        streams: what the outputs of matrices are added to.
    """

    def __init__(self, network: Network, window: NDArray[np.int64]) -> None:
        self.window_bytes = 0
        self.streams = Streams()
        self._uses: dict[str, int] = {}
        self._seen: dict[str, Matrix] = {}
        self._looked_up: set[str] = set()
        self._last: Tensor | None = None
        self._weights = {parameter.untyped_storage().data_ptr() for parameter in network.model.parameters()}
        hooks = [layer.register_forward_pre_hook(self._enter, with_kwargs=True) for layer in network.layers]
        with torch.enable_grad(), Watch(network, self), saved_tensors_hooks(self._save, _restore):
            outputs = network.model(**model_inputs(network, window, predicts=True))
        self.window_bytes += _LOGIT_BYTES * predictions(outputs).numel()
        for hook in hooks:
            hook.remove()
        self.streams.leave()
        self._last = None
        self.sums: dict[str, int] = {}
        stacks = {matrix.stack for matrix in self._seen.values()} - {""}
        others = [matrix for matrix in network.matrices.values() if matrix.stack in stacks]
        for matrix in {id(matrix): matrix for matrix in (*self._seen.values(), *others)}.values():
            columns = matrix.shape[1]
            size_bytes = 8 * (1 + len(matrix.pieces)) * columns**2 + 4 * TOKENS_PER_PRODUCT * columns
            self.sums[_key(matrix)] = self.sums.get(_key(matrix), 0) + size_bytes

    @property
    def order(self) -> list[str]:
        """The checkpoint's matrices in the order of their first products."""
        return [piece.name for matrix in self._seen.values() for piece in matrix.pieces]

    @property
    def single(self) -> list[str]:
        """Those that are multiplied with once and for nothing else used, and are no members of stacks."""
        once = [name for name, uses in self._uses.items() if uses == 1 and name not in self._looked_up]
        return [name for name in once if not self._seen[name].stack]

    @property
    def repeated(self) -> list[str]:
        """Those that are multiplied with several times."""
        return [name for name, uses in self._uses.items() if uses > 1]

    def passes(self, memory: Memory) -> list[set[str]]:
        """The keys of matrices whose sums fit the memory together.

        Raises:
            EntroLLMError: the sums of one matrix do not.
        """
        found: list[set[str]] = [set()]
        left = memory.left
        for key, size_bytes in self.sums.items():
            if size_bytes > left and found[-1]:
                found.append(set())
                left = memory.left
            if size_bytes > left:
                memory.take(size_bytes)
            found[-1].add(key)
            left -= size_bytes
        return found

    def product(self, matrix: Matrix, x: Tensor, is_transposed: bool, multiply: Callable[[], Tensor]) -> Tensor:
        """See one product."""
        y = multiply()
        name = matrix.pieces[0].name
        self._seen.setdefault(name, matrix)
        self._uses[name] = self._uses.get(name, 0) + 1
        self.streams.product(name, y)
        # Hooks hold the inputs until gradients come, and matrices that are used again hold those gradients.
        self.window_bytes += 4 * (y.numel() + (0 if x is self._last else x.numel()))
        self._last = x
        return y

    def look_up(self, matrix: Matrix, ids: Tensor, rows: Tensor) -> None:
        """See rows that are looked up."""
        name = matrix.pieces[0].name
        self._seen.setdefault(name, matrix)
        self._looked_up.add(name)

    def add(self, first: Tensor, second: Tensor, total: Tensor) -> None:
        """Follow the streams."""
        self.streams.add(first, second, total)

    def _enter(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.streams.enter(args, kwargs)

    def _save(self, tensor: Tensor) -> None:
        """Count what autograd would keep. Tensors that it keeps several times count several times."""
        if tensor.untyped_storage().data_ptr() not in self._weights:
            self.window_bytes += tensor.numel() * tensor.element_size()


def _restore(saved: None) -> Tensor:
    raise AssertionError("nothing is passed back")


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
        if _key(matrix) not in self._keys:
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
        if _key(matrix) in self._keys:
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


def _key(matrix: Matrix) -> str:
    """Matrices of one key are measured together."""
    return matrix.stack or matrix.pieces[0].name
