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

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional
from torch.utils._pytree import tree_flatten, tree_unflatten
from transformers.cache_utils import Cache

from entrollm.arrays import HOST, Device, double
from entrollm.calibrate.inputs import batches, model_inputs, vocabulary
from entrollm.calibrate.lockstep import Call, Lockstep
from entrollm.calibrate.network import Matrix, Network
from entrollm.calibrate.store import Spool, StoredStatistics
from entrollm.calibrate.sums import RARE_TOKEN, Moments, Squares, draw_labels, mean_moments
from entrollm.calibrate.watch import Streams, Watch
from entrollm.checkpoint.model_folder import Checkpoint
from entrollm.errors import EntroLLMError, UnsupportedError
from entrollm.quantize.statistics import Sensitivity, damped_factor
from entrollm.torch.device import TorchDevice

# Windows that gradients are taken of; squares of gradients converge sooner than correlations of inputs.
_GRADIENT_WINDOWS = 64
# A member of a stack with as many tokens as this share of its inputs is trusted as much as all members together.
_POOLED_SHARE = 0.5

Progress = Callable[[float, float], None]


@dataclass
class _Seen:
    """What is known of a matrix.

    Attributes:
        matrix: the matrix.
        group: the name under which the moments of its columns' side are added up.
        squares: of the gradients, by piece.
        is_looked_up: whether its rows are looked up.
    """

    matrix: Matrix
    group: str
    squares: dict[str, Squares] = field(default_factory=dict)
    is_looked_up: bool = False


class _Watcher:
    """Adds up the inputs of products, and the gradients of their outputs if there are any.

    Attributes:
        seen: the matrices by the name of their first piece.
        moments: sums over the inputs of the products, or over the gradients of the outputs where matrices are
            transposed, by group.
        tokens: how many are in each sum.
        windows: how many the next products are about.
        streams: what the outputs are added to.
    """

    def __init__(self, adds_inputs: bool) -> None:
        self.seen: dict[str, _Seen] = {}
        self.moments: dict[str, Moments] = {}
        self.tokens: dict[str, int] = {}
        self.windows = 1
        self.streams = Streams()
        self._adds_inputs = adds_inputs
        self._last: tuple[Tensor, str] | None = None

    def product(self, matrix: Matrix, x: Tensor, is_transposed: bool, multiply: Callable[[], Tensor]) -> Tensor:
        """See one product."""
        y = multiply()
        name = matrix.pieces[0].name
        if name not in self.seen:
            shares = self._last is not None and self._last[0] is x and not is_transposed
            group = self._last[1] if shares and self._last is not None else name
            self.seen[name] = _Seen(matrix, group)
        seen = self.seen[name]
        self._last = x, seen.group
        inputs = x.detach().reshape(-1, x.shape[-1])
        if self._adds_inputs and not is_transposed and seen.group == name:
            self._add(name, inputs)
        if y.requires_grad:
            y.register_hook(partial(self._gradient, seen, inputs, is_transposed))  # type: ignore[no-untyped-call]
        self.streams.product(name, y)
        return y

    def add(self, first: Tensor, second: Tensor, total: Tensor) -> None:
        """See an addition."""
        self.streams.add(first, second, total)

    def look_up(self, matrix: Matrix, ids: Tensor, rows: Tensor) -> None:
        """See rows that are looked up."""
        if not rows.requires_grad:
            return
        name = matrix.pieces[0].name
        seen = self.seen.setdefault(name, _Seen(matrix, name))
        seen.is_looked_up = True
        rows.register_hook(partial(self._look_up_gradient, seen, ids))  # type: ignore[no-untyped-call]

    def names(self) -> list[str]:
        """The checkpoint's matrices that were seen, in order."""
        return [piece.name for seen in self.seen.values() for piece in seen.matrix.pieces]

    def forget(self) -> None:
        """Let go of what was seen last."""
        self._last = None
        self.streams.leave()

    def _add(self, group: str, x: Tensor) -> None:
        self.moments.setdefault(group, Moments()).add(x)
        self.tokens[group] = self.tokens.get(group, 0) + len(x)

    def _gradient(self, seen: _Seen, inputs: Tensor, is_transposed: bool, gradient: Tensor) -> None:
        outputs = gradient.detach().reshape(-1, gradient.shape[-1])
        columns, rows = (outputs, inputs) if is_transposed else (inputs, outputs)
        if is_transposed:
            self._add(seen.group, outputs)
        is_shared = bool(seen.matrix.stack)  # its tokens come from any window
        for x, dy in zip(self._windows_of(columns, is_shared), self._windows_of(rows, is_shared), strict=True):
            for piece in seen.matrix.pieces:
                squares = seen.squares.setdefault(piece.name, Squares())
                squares.add_product(x, dy[:, piece.begin : piece.end])

    def _look_up_gradient(self, seen: _Seen, ids: Tensor, gradient: Tensor) -> None:
        name = seen.matrix.pieces[0].name
        squares = seen.squares.setdefault(name, Squares())
        rows = gradient.detach().reshape(-1, gradient.shape[-1])
        is_shared = len(ids) != self.windows  # positions, which all windows have
        flat = ids.expand(gradient.shape[:-1]).reshape(-1)
        for window, found in zip(self._windows_of(flat, is_shared), self._windows_of(rows, is_shared), strict=True):
            unique, places = torch.unique(window, return_inverse=True)
            squares.add(found.new_zeros(len(unique), found.shape[1]).index_add_(0, places, found))

    def _windows_of(self, rows: Tensor, is_shared: bool = False) -> list[Tensor]:
        """The rows of each window, or all together if they belong to no window."""
        if is_shared or len(rows) % self.windows:
            return [rows]
        return list(rows.reshape(self.windows, -1, *rows.shape[1:]))


class _Node:
    """A tensor that a layer gave, and its gradient once that is known."""

    def __init__(self) -> None:
        self.gradient: Tensor | None = None

    def add(self, gradient: Tensor) -> None:
        """Add a part of the gradient."""
        self.gradient = gradient if self.gradient is None else self.gradient + gradient

    def leaf(self, given: Tensor) -> Tensor:
        """The tensor, from which gradients come here."""
        leaf = given.detach().requires_grad_()
        leaf.entrollm_node = self  # type: ignore[attr-defined]
        leaf.register_post_accumulate_grad_hook(self._take)  # type: ignore[no-untyped-call]
        return leaf

    def _take(self, leaf: Tensor) -> None:
        assert leaf.grad is not None
        self.add(leaf.grad)
        leaf.grad = None


class _Visit:
    """A batch in a layer: what is needed to run the layer again, with gradients."""

    def __init__(self, call: Call, key: str, spool: Spool) -> None:
        self.batch = call.batch
        self._values, self._form = tree_flatten((call.args, call.kwargs))
        self._spool = spool
        self._waiting: dict[int, tuple[str, _Node]] = {}
        self._glued: dict[int, Tensor] = {}
        self._given: list[_Node | None] = []
        for place, value in enumerate(self._values):
            if isinstance(value, Cache):
                raise UnsupportedError("a layer reads keys and values of others, which calibration does not follow")
            if not isinstance(value, Tensor) or not value.requires_grad:
                continue
            self._values[place] = value.detach()
            node = getattr(value, "entrollm_node", None)
            if node is None:
                self._glued[place] = value
            else:
                self._waiting[place] = f"{key}-{place}", node
                spool.put(f"{key}-{place}", value.detach())

    def forward(self, layer: Callable[..., Any]) -> Any:
        """Run the layer, and mark what it gives."""
        args, kwargs = tree_unflatten(self._values, self._form)
        with torch.no_grad():
            given, form = tree_flatten(layer(*args, **kwargs))
        for place in self._waiting:
            self._values[place] = None
        self._given = [_Node() if isinstance(value, Tensor) and value.is_floating_point() else None for value in given]
        marked = [value if node is None else node.leaf(value) for value, node in zip(given, self._given, strict=True)]
        return tree_unflatten(marked, form)

    def backward(self, layer: Callable[..., Any]) -> None:
        """Run the layer again, and pass gradients from what it gave to what it read."""
        values, leaves = list(self._values), {}
        for place in (*self._waiting, *self._glued):
            stored = self._spool.take(self._waiting[place][0]) if place in self._waiting else self._values[place]
            leaves[place] = stored.requires_grad_()
            values[place] = stored.clone()  # layers may change what they read
        args, kwargs = tree_unflatten(values, self._form)
        with torch.enable_grad():
            given, _ = tree_flatten(layer(*args, **kwargs))
        ends = [
            (value, node.gradient)
            for value, node in zip(given, self._given, strict=True)
            if node is not None and node.gradient is not None and value.requires_grad
        ]
        if ends:
            torch.autograd.backward([value for value, _ in ends], [gradient for _, gradient in ends])
        self._given = []
        for place, leaf in leaves.items():
            if leaf.grad is None:
                continue
            if place in self._waiting:
                self._waiting[place][1].add(leaf.grad)
            else:
                torch.autograd.backward(self._glued[place], leaf.grad, retain_graph=True)


def measure(
    checkpoint: Checkpoint,
    windows: NDArray[np.int64],
    folder: Path,
    progress: Progress | None = None,
    device: Device = HOST,
) -> StoredStatistics:
    """Run windows of text through a model and keep what its matrices see, and how much their errors matter.

    Memory: the float32 weights outside the layers and of one layer, the hidden states of all windows, and 16 bytes x
    columns^2 for each matrix of a layer. On disk: the hidden states of at most 64 windows before each layer.

    Args:
        checkpoint: the model.
        windows: token ids, shape (windows, tokens).
        folder: where the statistics go; an empty folder that outlives the result.
        progress: called after each layer of each pass with those done and in all.
        device: what computes.
    Raises:
        EntroLLMError: activations or gradients are not finite.
        FormatError: a tensor is missing or has another shape.
        UnsupportedError: transformers does not know the model, or its layers cannot be walked.
    """
    place = device if isinstance(device, TorchDevice) else TorchDevice("cpu")
    network = Network(checkpoint, place)
    stored = StoredStatistics(folder, windows, device)
    _Measurement(network, windows, stored, Spool(folder, place)).run(progress)
    return stored


@dataclass(frozen=True)
class _Batch:
    ids: NDArray[np.int64]
    has_gradient: bool


class _Measurement:
    def __init__(self, network: Network, windows: NDArray[np.int64], stored: StoredStatistics, spool: Spool) -> None:
        self._network = network
        self._stored = stored
        self._spool = spool
        picked = np.unique(np.linspace(0, len(windows) - 1, min(len(windows), _GRADIENT_WINDOWS)).astype(int))
        others = np.setdiff1d(np.arange(len(windows)), picked)
        self._batches = [
            _Batch(ids, has_gradient)
            for chosen, has_gradient in ((picked, True), (others, False))
            for ids in batches(windows[chosen], network.model)
        ]
        self._glue = _Watcher(adds_inputs=True)
        self._tokens: dict[str, int] = {}
        self._likely: Tensor | None = None
        self._predictions = 0
        self._generator = np.random.default_rng(0)

    def run(self, progress: Progress | None) -> None:
        """Both passes."""
        layers = self._network.layers
        lockstep = Lockstep(layers, self._network.names)
        try:
            visits: list[tuple[int, list[_Visit]]] = []
            for index, calls in lockstep.run([partial(self._go, batch) for batch in self._batches]):
                assert isinstance(index, int)
                self._stored.add_order(self._glue.names())
                visits.append((index, self._forward(lockstep, index, calls)))
                if progress is not None:
                    progress(len(visits), 2 * len(layers))
            self._stored.add_order(self._glue.names())
            self._stored.streams |= {name: None for name, seen in self._glue.seen.items() if not seen.is_looked_up}
            done = len(visits)
            while visits:
                self._backward(lockstep, *visits.pop())
                if progress is not None:
                    progress(2 * done - len(visits), 2 * done)
        finally:
            lockstep.close()
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
            loss = self._loss(outputs["logits"] if "logits" in outputs else outputs[0])
            loss.backward()  # type: ignore[no-untyped-call]
            self._glue.forget()

    def _loss(self, predicted: Tensor) -> Tensor:
        """A loss whose gradients have the second derivatives of the divergence as their squares."""
        flat = predicted.reshape(-1, predicted.shape[-1])
        self._predictions += len(flat)
        if predicted.shape[-1] != vocabulary(self._network.model):
            # Outputs that are no distribution: a Gaussian around them, as wide as they are large.
            signs = torch.from_numpy(self._generator.integers(0, 2, tuple(flat.shape)) * 2.0 - 1).to(flat)
            return (flat * signs).sum() / flat.detach().square().mean().sqrt().clamp_min(1e-20)
        probabilities, labels = draw_labels(flat.detach().float().clone(), self._generator)
        total = probabilities.sum(axis=0, dtype=torch.float64)
        self._likely = total if self._likely is None else self._likely + total
        return functional.cross_entropy(flat.float(), labels, reduction="sum")

    def _forward(self, lockstep: Lockstep, index: int, calls: list[Call]) -> list[_Visit]:
        """Run a layer on all batches."""
        self._network.load(index)
        watcher = _Watcher(adds_inputs=True)
        layer = partial(_call, lockstep, index, watcher)
        visits = []
        with Watch(self._network, watcher):
            for call in calls:
                if self._batches[call.batch].has_gradient:
                    visits.append(_Visit(call, f"{index}-{call.batch}", self._spool))
                    call.result = visits[-1].forward(layer)
                else:
                    with torch.no_grad():
                        call.result = layer(*call.args, **call.kwargs)
                watcher.forget()
        self._put_moments(index, watcher)
        self._stored.add_order(watcher.names())
        self._stored.streams |= {
            name: watcher.streams.found.get(name) for name, seen in watcher.seen.items() if not seen.matrix.stack
        }
        self._network.release(index)
        return visits

    def _put_moments(self, index: int, watcher: _Watcher) -> None:
        """Let the moments of a layer wait, those of members of a stack together with those of all members."""
        totals = {}
        for group, moments in watcher.moments.items():
            totals[group] = moments.total()
            if not torch.isfinite(totals[group]).all():
                raise EntroLLMError(f"{group}: its inputs on the calibration text are not finite")
        for group, total in totals.items():
            self._spool.put_triangle(f"{index}-{group}", total)
        self._tokens |= watcher.tokens

    def _backward(self, lockstep: Lockstep, index: int, visits: list[_Visit]) -> None:
        """Run a layer again with gradients, and keep the statistics of its matrices."""
        self._network.load(index)
        watcher = _Watcher(adds_inputs=False)
        layer = partial(_call, lockstep, index, watcher)
        with Watch(self._network, watcher):
            for visit in visits:
                watcher.windows = self._glue.windows = len(self._batches[visit.batch].ids)
                visit.backward(layer)
                watcher.forget()
        waiting = {seen.group: seen.matrix.shape[1] for seen in watcher.seen.values()}
        waiting |= {name: matrix.shape[1] for name, matrix in self._unseen(index, watcher).items()}
        totals = {
            group: double(self._spool.take_triangle(f"{index}-{group}", size))
            for group, size in waiting.items()
            if group in self._tokens
        }
        totals |= {group: moments.total() for group, moments in watcher.moments.items()}
        self._keep(watcher, totals, self._tokens | watcher.tokens)
        self._network.release(index)

    def _unseen(self, index: int, watcher: _Watcher) -> dict[str, Matrix]:
        """Members of stacks that gradients did not reach."""
        stacks = {seen.matrix.stack for seen in watcher.seen.values()} - {""}
        found = {matrix.pieces[0].name: matrix for matrix in self._network.matrices.values() if matrix.stack in stacks}
        missing = {name: matrix for name, matrix in found.items() if name not in watcher.seen}
        watcher.seen |= {name: _Seen(matrix, name) for name, matrix in missing.items()}
        return missing

    def _keep(self, watcher: _Watcher, totals: Mapping[str, Tensor], tokens: Mapping[str, int]) -> None:
        """Store the statistics of all matrices that a watcher has seen."""
        pools = _Pools(watcher.seen.values(), totals, tokens)
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
                weight = self._network.weight(piece.name)
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


class _Pools:
    """Statistics of the members of stacks, each drawn to those of all members as far as it has few tokens."""

    def __init__(self, seen: Iterable[_Seen], totals: Mapping[str, Tensor], tokens: Mapping[str, int]) -> None:
        self._totals, self._tokens = totals, tokens
        self._pooled: dict[str, list[Any]] = {}
        for found in seen:
            if not found.matrix.stack:
                continue
            # Sums of moments, tokens, sums of squares by place among the pieces.
            pool = self._pooled.setdefault(found.matrix.stack, [None, 0, {}])
            if found.group in totals:
                pool[0] = totals[found.group].clone() if pool[0] is None else pool[0] + totals[found.group]
                pool[1] += tokens[found.group]
            for place, piece in enumerate(found.matrix.pieces):
                squares = found.squares.get(piece.name)
                if squares is not None and squares.columns is not None:
                    known = pool[2].get(place)
                    pool[2][place] = squares.columns.clone() if known is None else known + squares.columns

    def of(self, seen: _Seen, name: str) -> tuple[Tensor | None, Tensor | None, float]:
        """The sum of G^T G and of x x^T, each up to a factor, and the sum of all squares of G."""
        squares, moments = seen.squares.get(name), self._totals.get(seen.group)
        columns = None if squares is None else squares.columns
        total = 0.0 if squares is None or columns is None else squares.total
        if not seen.matrix.stack:
            return columns, moments, total
        pooled, tokens, by_place = self._pooled[seen.matrix.stack]
        place = next(at for at, piece in enumerate(seen.matrix.pieces) if piece.name == name)
        own = self._tokens.get(seen.group, 0)
        trust = own / (own + _POOLED_SHARE * seen.matrix.shape[1])
        if columns is None and place in by_place:
            # As much as half a token would have given.
            total = 0.5 * float(torch.trace(by_place[place])) / max(1, tokens)
        return _blend(columns, by_place.get(place), trust), _blend(moments, pooled, trust), total


def _blend(own: Tensor | None, pooled: Tensor | None, trust: float) -> Tensor | None:
    """A mean of two sums, each divided by its trace."""
    parts = [(part, weight) for part, weight in ((own, trust), (pooled, 1 - trust)) if part is not None]
    scaled = [part * (weight / trace) for part, weight in parts if (trace := float(torch.trace(part))) > 0]
    return sum(scaled[1:], scaled[0]) if scaled else (pooled if own is None else own)


def _call(lockstep: Lockstep, index: int, watcher: _Watcher, *args: Any, **kwargs: Any) -> Any:
    watcher.streams.enter(args, kwargs)
    return lockstep.forward(index, args, kwargs)
