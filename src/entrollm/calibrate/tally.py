"""From predictions to a loss, and from what a watcher has seen to the statistics of matrices."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from entrollm.calibrate.inputs import batches, vocabulary
from entrollm.calibrate.network import Matrix, Network
from entrollm.calibrate.seen import Pools, Seen, Watcher
from entrollm.calibrate.store import StoredStatistics
from entrollm.calibrate.sums import RARE_TOKEN, draw_labels, mean_moments
from entrollm.errors import EntroLLMError
from entrollm.quantize.statistics import Sensitivity, damped_factor

# Windows that gradients are taken of; squares of gradients converge sooner than correlations of inputs.
_GRADIENT_WINDOWS = 64

Batch = tuple[NDArray[np.int64], bool]
"""Token ids, shape (windows, tokens), and whether gradients are taken of them."""


def gradient_batches(windows: NDArray[np.int64], network: Network, at_most: int | None = None) -> list[Batch]:
    """Windows, shape (windows, tokens), in batches; the first ones, evenly spaced windows, are for gradients.

    Args:
        windows: all of them.
        network: the model that reads them.
        at_most: windows of a batch; None for as many as `batches` takes.
    """
    picked = np.unique(np.linspace(0, len(windows) - 1, min(len(windows), _GRADIENT_WINDOWS)).astype(int))
    others = np.setdiff1d(np.arange(len(windows)), picked)
    return [
        (ids, has_gradient)
        for chosen, has_gradient in ((picked, True), (others, False))
        for ids in batches(windows[chosen], network.model, at_most)
    ]


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
        self._generator = np.random.default_rng(0)

    def loss(self, predicted: Tensor) -> Tensor:
        """A loss whose gradients have the second derivatives of the divergence as their squares.

        Args:
            predicted: what the model gives for a batch, (windows, tokens, vocabulary).
        """
        flat = predicted.reshape(-1, predicted.shape[-1])
        self._predictions += len(flat)
        if predicted.shape[-1] != vocabulary(self._network.model):
            # Outputs that are no distribution: a Gaussian around them, as wide as they are large.
            signs = torch.from_numpy(self._generator.integers(0, 2, tuple(flat.shape)) * 2.0 - 1).to(flat)
            return (flat * signs).sum() / flat.detach().square().mean().sqrt().clamp_min(1e-20)
        probabilities, labels = draw_labels(flat.detach().float().clone(), self._generator)
        total = probabilities.sum(0, dtype=torch.float64)
        self._likely = total if self._likely is None else self._likely + total
        return functional.cross_entropy(flat.float(), labels, reduction="sum")

    def unseen(self, watcher: Watcher) -> dict[str, Matrix]:
        """Loaded members of stacks that gradients did not reach; the watcher counts them as seen from now on."""
        stacks = {seen.matrix.stack for seen in watcher.seen.values()} - {""}
        found = {matrix.pieces[0].name: matrix for matrix in self._network.matrices.values() if matrix.stack in stacks}
        missing = {name: matrix for name, matrix in found.items() if name not in watcher.seen}
        watcher.seen |= {name: Seen(matrix, name) for name, matrix in missing.items()}
        return missing

    def keep(self, watcher: Watcher, totals: Mapping[str, Tensor], tokens: Mapping[str, int]) -> None:
        """Store the statistics of all matrices that a watcher has seen.

        Args:
            watcher: what saw gradients.
            totals: sums over the inputs, by group.
            tokens: how many are in each sum.
        Raises:
            EntroLLMError: gradients are not finite.
        """
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
