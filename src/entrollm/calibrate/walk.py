"""Two passes over the layers of a model, one in memory at a time: what its matrices see, and how much they matter.

The first pass runs windows of text forward and adds up x x^T over the inputs x of every matrix. The second takes
labels that the model itself finds likely, passes the gradient of their loss back, and adds up the squares of the
gradient G of every matrix over windows: with such labels they are the second derivative of the KL divergence, so
that a white error of variance v costs v / 2 times their sum, and G^T G weighs errors by column as x x^T does,
with the sensitivity of the outputs counted in.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from entrollm.calibrate.arithmetic import rms_norm
from entrollm.calibrate.backward import LayerGradient, draw_labels, rms_norm_gradient
from entrollm.calibrate.store import Spool, StoredStatistics
from entrollm.checkpoint import Checkpoint
from entrollm.engine.config import ModelConfig
from entrollm.engine.linear import DenseWeights
from entrollm.engine.rope import RopeTables
from entrollm.engine.walk import LayerWalk
from entrollm.engine.weights import Embedding, Floats, Linear, load_tensor
from entrollm.errors import EntroLLMError
from entrollm.quantize.statistics import Sensitivity, damped_factor

# Activations of so many tokens wait for one product, which costs less than many small ones.
_TOKENS_PER_PRODUCT = 4096
# Windows that gradients are taken of; squares of gradients converge sooner than correlations of inputs.
_GRADIENT_WINDOWS = 64
_EMBEDDING, _HEAD, _NORM = "model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"
# A token that the windows never suggest counts as this share of the mean one.
_RARE_TOKEN = 0.1

Progress = Callable[[float, float], None]
Float64 = NDArray[np.float64]


def measure(
    checkpoint: Checkpoint,
    config: ModelConfig,
    windows: NDArray[np.int64],
    folder: Path,
    progress: Progress | None = None,
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
    Raises:
        EntroLLMError: activations or gradients are not finite.
        FormatError: a tensor is missing or has the wrong shape.
    """
    spool = Spool(folder)
    stored = StoredStatistics(folder, hashlib.sha256(windows.tobytes()).hexdigest())
    picked = np.unique(np.linspace(0, len(windows) - 1, min(len(windows), _GRADIENT_WINDOWS)).astype(int))
    passes = 2 * config.num_layers
    walk = LayerWalk(config, DenseWeights(checkpoint), windows)
    for index in range(config.num_layers):
        spool.put(f"hidden-{index}", np.stack([walk.hidden[i] for i in picked]))
        recorder = _Recorder(checkpoint)
        walk.step(index, recorder)
        for names, moments in recorder.moments():
            if not np.isfinite(moments).all():
                raise EntroLLMError(f"{names[0]}: its inputs on the calibration text are not finite")
            for name in names:
                spool.put(name, (moments / windows.size).astype(np.float32))
        if progress is not None:
            progress(index + 1, passes)
    hidden = [walk.hidden[i] for i in picked]
    del walk
    _Backward(checkpoint, config, windows[picked], spool, stored).run(hidden, progress)
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
        self._checkpoint = checkpoint
        self._config = config
        self._windows = windows
        self._spool = spool
        self._stored = stored
        self._is_tied = config.tied_embeddings or _HEAD not in checkpoint.tensors

    def run(self, hidden: list[Floats], progress: Progress | None) -> None:
        """Take the gradients of all matrices, given what the last layer gave for each window."""
        config = self._config
        tokens = self._windows.shape[1]
        tables = RopeTables(config.rope).rows(0, tokens, config.rope.is_long(tokens))
        gradients, head, likely = self._head(hidden)
        for index in reversed(range(config.num_layers)):
            layer = LayerGradient(config, self._checkpoint.read_float32, index)
            squares: dict[str, Squares] = {}

            def record(name: str, x: Floats, gradient: Floats, squares: dict[str, Squares] = squares) -> None:
                squares.setdefault(name, Squares(x.shape[1])).add_product(x, gradient)

            inputs = self._spool.take(f"hidden-{index}")
            gradients = [layer(x, tables, gradient, record) for x, gradient in zip(inputs, gradients, strict=True)]
            for name, sums in squares.items():
                self._keep(name, sums, self._spool.take(name))
            if progress is not None:
                progress(2 * config.num_layers - index, 2 * config.num_layers)
        self._embedding(gradients, head, likely)

    def _head(self, hidden: list[Floats]) -> tuple[list[Floats], Squares, Float64]:
        """Gradients of what the last layer gave, squares of the head's, and the mean probability of each token."""
        config = self._config
        weights = DenseWeights(self._checkpoint)
        shape = (config.vocab_size, config.hidden_size)
        weight = load_tensor(weights, _EMBEDDING if self._is_tied else _HEAD, shape)
        norm = load_tensor(weights, _NORM, (config.hidden_size,))
        generator = np.random.default_rng(0)
        squares = Squares(config.hidden_size)
        moments = np.zeros((config.hidden_size, config.hidden_size))
        likely = np.zeros(config.vocab_size)
        gradients = []
        for x in hidden:
            normed = rms_norm(x, norm, config.norm_eps)
            probabilities, labels = draw_labels(normed @ weight.T, generator)
            likely += probabilities.sum(axis=0)
            probabilities[np.arange(len(labels)), labels] -= 1
            squares.add_product(normed, probabilities)
            moments += normed.T @ normed
            gradients.append(rms_norm_gradient(x, norm, config.norm_eps, probabilities @ weight))
        likely /= self._windows.size
        if not self._is_tied:
            self._keep(_HEAD, squares, moments / self._windows.size, likely)
        return gradients, squares, likely

    def _embedding(self, gradients: list[Floats], head: Squares, likely: Float64) -> None:
        squares = head if self._is_tied else Squares(self._config.hidden_size)
        for ids, gradient in zip(self._windows, gradients, strict=True):
            unique, places = np.unique(ids, return_inverse=True)
            rows = np.zeros((len(unique), gradient.shape[1]), np.float32)
            np.add.at(rows, places, gradient)
            squares.add(rows)
        self._keep(_EMBEDDING, squares, squares.columns, likely)

    def _keep(self, name: str, squares: Squares, moments: NDArray[np.floating], likely: Float64 | None = None) -> None:
        """Store the statistics of a matrix; `likely` weighs the rows of an embedding or head."""
        total = squares.total / self._windows.size
        if not np.isfinite(total):
            raise EntroLLMError(f"{name}: its gradients on the calibration text are not finite")
        factor = damped_factor(_mean_moments(squares.columns, moments.astype(np.float64)))
        weight = self._checkpoint.read_float32(name)
        share = total / 2 * float(np.square(weight, dtype=np.float64).mean())
        row_weights = None
        if likely is not None:
            likely = likely + _RARE_TOKEN * likely.mean()
            row_weights = (likely / likely.mean()).astype(np.float32)
        self._stored.add(name, factor, Sensitivity(share, row_weights))


def _mean_moments(first: Float64, second: Float64) -> Float64:
    """The mean of two estimates of one thing up to a factor."""
    traces = [float(np.trace(moments)) for moments in (first, second)]
    return sum((m / t for m, t in zip((first, second), traces, strict=True) if t > 0), np.zeros_like(first))


class Squares:
    """Sums over the gradients G of one matrix, one for each window.

    Attributes:
        columns: float64, G^T G.
    """

    def __init__(self, columns: int) -> None:
        self.columns = np.zeros((columns, columns))

    @property
    def total(self) -> float:
        """The sum of all squares."""
        return float(np.trace(self.columns))

    def add(self, gradient: Floats) -> None:
        """Add one window's gradient, or rows of it."""
        self.columns += gradient.T @ gradient

    def add_product(self, x: Floats, gradient: Floats) -> None:
        """Add one window's gradient, made of a matrix's inputs (n, columns) and its outputs' gradients (n, rows)."""
        n, rows = gradient.shape
        columns = x.shape[1]
        if n * n * (rows + columns) + n * columns**2 < n * rows * columns + rows * columns**2:
            self.columns += x.T @ ((gradient @ gradient.T) @ x)
        else:
            self.add(gradient.T @ x)


class _Recorder:
    """Weights that add up x x^T over everything that their matrices multiply."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._weights = DenseWeights(checkpoint)
        self.pool = self._weights.pool
        self._recorded: dict[tuple[str, ...], _Recorded] = {}

    def __contains__(self, name: str, /) -> bool:
        return name in self._weights

    def linear(self, *names: str) -> Linear:
        """The matrices, recorded."""
        self._recorded[names] = _Recorded(self._weights.linear(*names))
        return self._recorded[names]

    def moments(self) -> Iterator[tuple[tuple[str, ...], NDArray[np.float64]]]:
        """Names and sums of those matrices that were multiplied with."""
        for names, recorded in self._recorded.items():
            if recorded.is_used:
                yield names, recorded.moments()

    def embedding(self, name: str, /) -> Embedding:
        """The matrix `name`; look-ups are not recorded."""
        return self._weights.embedding(name)

    def tensor(self, name: str, /) -> Floats:
        """The tensor `name` in float32."""
        return self._weights.tensor(name)


class _Recorded:
    def __init__(self, inner: Linear) -> None:
        self._inner = inner
        self._waiting: list[Floats] = []
        self._sum: NDArray[np.float64] | None = None
        self.shape = inner.shape

    @property
    def is_used(self) -> bool:
        return self._sum is not None or bool(self._waiting)

    def __call__(self, x: Floats, /) -> Floats:
        self._waiting.append(x.copy())
        if len(self._waiting) * len(x) >= _TOKENS_PER_PRODUCT:
            self._flush()
        return self._inner(x)

    def moments(self) -> NDArray[np.float64]:
        self._flush()
        assert self._sum is not None
        return self._sum

    def _flush(self) -> None:
        if self._sum is None:
            self._sum = np.zeros((self.shape[1], self.shape[1]))
        if self._waiting:
            x = np.concatenate(self._waiting)
            self._sum += x.T @ x
            self._waiting.clear()
