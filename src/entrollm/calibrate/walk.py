"""Two passes over the layers of a model, one in memory at a time: what its matrices see, and how much they matter.

The first pass runs windows of text forward and adds up x x^T over the inputs x of every matrix. The second takes
labels that the model itself finds likely, passes the gradient of their loss back, and adds up the squares of the
gradient G of every matrix over windows: with such labels they are the second derivative of the KL divergence, so
that a white error of variance v costs v / 2 times their sum, and G^T G weighs errors by column as x x^T does,
with the sensitivity of the outputs counted in.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from entrollm.arrays import HOST, Array, Device, double, functions, like
from entrollm.calibrate.arithmetic import rms_norm, rms_norm_gradient
from entrollm.calibrate.backward import LayerGradient, draw_labels
from entrollm.calibrate.forward import Moments, start
from entrollm.calibrate.layer import NORM, LayerWeights, Tensors, causal_mask, rotation
from entrollm.calibrate.store import Spool, StoredStatistics
from entrollm.checkpoint.model_folder import Checkpoint
from entrollm.checkpoint.names import EMBEDDING, HEAD, output_head
from entrollm.errors import EntroLLMError
from entrollm.models.config import ModelConfig
from entrollm.quantize.statistics import Sensitivity, damped_factor

# Windows that gradients are taken of; squares of gradients converge sooner than correlations of inputs.
_GRADIENT_WINDOWS = 64
# A token that the windows never suggest counts as this share of the mean one.
_RARE_TOKEN = 0.1

Progress = Callable[[float, float], None]


def measure(
    checkpoint: Checkpoint,
    config: ModelConfig,
    windows: NDArray[np.int64],
    folder: Path,
    progress: Progress | None = None,
    device: Device = HOST,
) -> StoredStatistics:
    """Run windows of text through a model and keep what its matrices see, and how much their errors matter.

    Memory: the float32 weights of one layer and of the embedding, the hidden states of all windows (4 bytes x tokens x
    hidden_size), and 16 bytes x columns^2 for each matrix of a layer.

    Args:
        checkpoint: the model.
        config: its configuration.
        windows: token ids, shape (windows, tokens).
        folder: where the statistics go; an empty folder that outlives the result.
        progress: called after each layer of each pass with those done and in all.
        device: what computes.
    Raises:
        EntroLLMError: activations or gradients are not finite.
        FormatError: a tensor is missing or has the wrong shape.
    """
    spool = Spool(folder, device)
    stored = StoredStatistics(folder, config, windows, device)
    picked = np.unique(np.linspace(0, len(windows) - 1, min(len(windows), _GRADIENT_WINDOWS)).astype(int))
    passes = 2 * config.num_layers
    forward = start(checkpoint, config, windows, device)
    inputs: dict[str, str] = {}
    for index in range(config.num_layers):
        spool.put(f"hidden-{index}", functions(forward.hidden[0]).stack([forward.hidden[i] for i in picked]))
        seen: dict[tuple[str, ...], Moments] = {}

        def see(names: tuple[str, ...], x: Array, seen: dict[tuple[str, ...], Moments] = seen) -> None:
            seen.setdefault(names, Moments()).add(x)

        forward.step(index, see)
        for names, moments in seen.items():
            total = moments.total()
            if not functions(total).isfinite(total).all():
                raise EntroLLMError(f"{names[0]}: its inputs on the calibration text are not finite")
            spool.put_triangle(names[0], total / windows.size)
            inputs |= dict.fromkeys(names, names[0])
        if progress is not None:
            progress(index + 1, passes)
    hidden = [forward.hidden[i] for i in picked]
    del forward
    _Backward(checkpoint, config, windows[picked], spool, stored).run(hidden, inputs, progress)
    return stored


class _Backward:
    """The second pass: from the labels' loss to the embedding."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        config: ModelConfig,
        windows: NDArray[np.int64],
        spool: Spool,
        stored: StoredStatistics,
    ) -> None:
        self._config = config
        self._windows = windows
        self._spool = spool
        self._stored = stored
        self._tensors = Tensors(checkpoint, stored.device)
        self._is_tied = output_head(self._tensors, is_tied=config.tied_embeddings) == EMBEDDING

    def run(self, hidden: list[Array], inputs: dict[str, str], progress: Progress | None) -> None:
        """Take the gradients of all matrices.

        Args:
            hidden: what the last layer gave for each window.
            inputs: for each matrix, under which key the moments of its inputs wait.
            progress: as for `measure`.
        """
        config, device = self._config, self._stored.device
        tokens = self._windows.shape[1]
        tables = rotation(config, tokens, device)
        gradients, head, likely = self._head(hidden)
        for index in reversed(range(config.num_layers)):
            weights = LayerWeights(config, self._tensors.read, self._tensors.read, index)
            layer = LayerGradient(weights, tables, device.put(causal_mask(tokens, weights.window)))
            squares: dict[str, Squares] = {}

            def record(name: str, x: Array, gradient: Array, squares: dict[str, Squares] = squares) -> None:
                squares.setdefault(name, Squares()).add_product(x, gradient)

            read = self._spool.take(f"hidden-{index}")
            gradients = [layer(x, gradient, record) for x, gradient in zip(read, gradients, strict=True)]
            shapes = weights.shapes
            del layer, weights
            for key, names in itertools.groupby(squares, key=inputs.__getitem__):
                moments = self._spool.take_triangle(key, shapes[key][1])
                for name in names:
                    self._keep(name, shapes[name], squares[name], moments)
            if progress is not None:
                progress(2 * config.num_layers - index, 2 * config.num_layers)
        self._embedding(gradients, head, likely)

    def _head(self, hidden: list[Array]) -> tuple[list[Array], Squares, Array]:
        """Gradients of what the last layer gave, squares of the head's, and the mean probability of each token."""
        config = self._config
        shape = (config.vocab_size, config.hidden_size)
        weight = self._tensors.read(EMBEDDING if self._is_tied else HEAD, shape)
        norm = self._tensors.read(NORM, (config.hidden_size,))
        generator = np.random.default_rng(0)
        squares, moments = Squares(), Moments()
        likely = like(weight, np.zeros(config.vocab_size))
        gradients = []
        for x in hidden:
            normed = rms_norm(x, norm, config.norm_eps)
            probabilities, labels = draw_labels(normed @ weight.T, generator)
            likely += probabilities.sum(axis=0)
            probabilities[like(labels, np.arange(len(labels))), labels] -= 1
            squares.add_product(normed, probabilities)
            moments.add(normed)
            gradients.append(rms_norm_gradient(x, norm, config.norm_eps, probabilities @ weight))
        likely /= self._windows.size
        if not self._is_tied:
            self._keep(HEAD, shape, squares, moments.total() / self._windows.size, likely)
        return gradients, squares, likely

    def _embedding(self, gradients: list[Array], head: Squares, likely: Array) -> None:
        device = self._stored.device
        squares = head if self._is_tied else Squares()
        for ids, gradient in zip(self._windows, gradients, strict=True):
            unique, places = np.unique(ids, return_inverse=True)
            rows = np.zeros((len(unique), gradient.shape[1]), np.float32)
            np.add.at(rows, places, device.take(gradient))
            squares.add(device.put(rows))
        shape = (self._config.vocab_size, self._config.hidden_size)
        self._keep(EMBEDDING, shape, squares, squares.columns, likely)

    def _keep(
        self, name: str, shape: tuple[int, int], squares: Squares, moments: Array, likely: Array | None = None
    ) -> None:
        """Store the statistics of a matrix; `likely` weighs the rows of an embedding or head."""
        total = squares.total / self._windows.size
        if not np.isfinite(total):
            raise EntroLLMError(f"{name}: its gradients on the calibration text are not finite")
        factor = damped_factor(_mean_moments(squares.columns, double(moments)))
        weight = self._tensors.read(name, shape)
        xp = functions(weight)
        share = total / 2 * float(xp.mean(xp.square(weight), dtype=xp.float64))
        row_weights = None
        if likely is not None:
            found = self._stored.device.take(likely)
            found = found + _RARE_TOKEN * found.mean()
            row_weights = (found / found.mean()).astype(np.float32)
        self._stored.add(name, factor, Sensitivity(share, row_weights))


def _mean_moments(first: Array, second: Array) -> Array:
    """The mean of two estimates of one thing up to a factor; only lower triangles count."""
    mean = functions(first).zeros_like(first)
    for moments in (first, second):
        trace = float(functions(moments).trace(moments))
        if trace > 0:
            mean += moments / trace
    return mean


class Squares:
    """Sums over the gradients G of one matrix, one for each window.

    Attributes:
        columns: float64, G^T G; None before the first.
    """

    def __init__(self) -> None:
        self.columns: Array | None = None

    @property
    def total(self) -> float:
        """The sum of all squares."""
        return float(functions(self.columns).trace(self.columns))

    def add(self, gradient: Array) -> None:
        """Add one window's gradient, or rows of it."""
        self._add(gradient.T @ gradient)

    def add_product(self, x: Array, gradient: Array) -> None:
        """Add one window's gradient, made of a matrix's inputs (n, columns) and its outputs' gradients (n, rows)."""
        n, rows = gradient.shape
        columns = x.shape[1]
        if n * n * (rows + columns) + n * columns**2 < n * rows * columns + rows * columns**2:
            self._add(x.T @ ((gradient @ gradient.T) @ x))
        else:
            self.add(gradient.T @ x)

    def _add(self, product: Array) -> None:
        if self.columns is None:
            self.columns = double(product)
        else:
            self.columns += product
