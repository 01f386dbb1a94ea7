"""From predictions to a loss, and from what a watcher has seen to the statistics of matrices."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from entrollm.calibrate.inputs import batches, vocabulary
from entrollm.calibrate.joined import check_windows
from entrollm.calibrate.network import Matrix, Network
from entrollm.calibrate.seen import Pools, Seen, Watcher
from entrollm.calibrate.store import StoredStatistics
from entrollm.calibrate.sums import RARE_TOKEN, draw_labels, mean_moments, random_numbers
from entrollm.errors import EntroLLMError
from entrollm.processes import Group, share
from entrollm.quantize.statistics import Sensitivity, damped_factor

# Windows that gradients are taken of; squares of gradients converge sooner than correlations of inputs.
_GRADIENT_WINDOWS = 64


@dataclass(frozen=True)
class Batch:
    """Windows that go through a model together.

    Attributes:
        ids: token ids, shape (windows, tokens).
        has_gradient: whether gradients are taken of them.
        numbers: those of the windows among all that are alike in that.
    """

    ids: NDArray[np.int64]
    has_gradient: bool
    numbers: NDArray[np.int64]


def gradient_batches(
    windows: NDArray[np.int64], network: Network, group: Group, at_most: int | None = None
) -> list[Batch]:
    """A process's windows, shape (windows, tokens), in batches; first evenly spaced ones, which are for gradients.

    Args:
        windows: all of them.
        network: the model that reads them.
        group: the processes that share them.
        at_most: windows of a batch; None for as many as `batches` takes.
    """
    picked = np.unique(np.linspace(0, len(windows) - 1, min(len(windows), _GRADIENT_WINDOWS)).astype(int))
    others = np.setdiff1d(np.arange(len(windows)), picked)
    check_windows(len(picked), group)
    own: list[Batch] = []
    for chosen, has_gradient in ((picked, True), (others, False)):
        found, done = [], 0
        for ids in batches(windows[chosen], network.model, at_most, group.size):
            found.append(Batch(ids, has_gradient, np.arange(done, done + len(ids))))
            done += len(ids)
        own += share(found, group)
    return own


class Tally:
    """Draws the labels of a loss, and stores what its gradients say of matrices.

    Args:
        network: the model.
        stored: where the statistics go.
    """

    def __init__(self, network: Network, stored: StoredStatistics) -> None:
        self._network = network
        self._stored = stored
        self._likely: Tensor | None = None
        self._predictions = 0
        self._group = stored.device.group

    def loss(self, predicted: Tensor, windows: NDArray[np.int64]) -> Tensor:
        """A loss whose gradients have the second derivatives of the divergence as their squares.

        Args:
            predicted: what the model gives for a batch, (windows, tokens, vocabulary).
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

    def join(self) -> None:
        """Add up the predictions of all processes."""
        self._predictions = sum(self._group.gather(self._predictions))
        if self._likely is not None:
            self._group.sum(self._likely)

    def unseen(self, watcher: Watcher) -> dict[str, Matrix]:
        """Loaded members of stacks that gradients did not reach; the watcher counts them as seen from now on."""
        stacks = {seen.matrix.stack for seen in watcher.seen.values()} - {""}
        found = {matrix.pieces[0].name: matrix for matrix in self._network.matrices.values() if matrix.stack in stacks}
        missing = {name: matrix for name, matrix in found.items() if name not in watcher.seen}
        watcher.seen |= {name: Seen(matrix, name) for name, matrix in missing.items()}
        return missing

    def keep(self, watcher: Watcher, totals: Mapping[str, Tensor], tokens: Mapping[str, int]) -> None:
        """Store the statistics of all matrices that a watcher has seen, in the first process.

        Args:
            watcher: what saw gradients.
            totals: sums over the inputs, by group.
            tokens: how many are in each sum.
        Raises:
            EntroLLMError: gradients are not finite.
        """
        if self._group.rank:
            return
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


def finite_totals(watcher: Watcher) -> dict[str, Tensor]:
    """Sums over the inputs that a watcher has seen, by group.

    Raises:
        EntroLLMError: one is not finite.
    """
    totals = {}
    for group, moments in watcher.moments.items():
        totals[group] = moments.total()
        if not torch.isfinite(totals[group]).all():
            raise EntroLLMError(f"{group}: its inputs on the calibration text are not finite")
    return totals
