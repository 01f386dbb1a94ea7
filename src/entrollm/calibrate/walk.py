"""Second moments of the inputs of every matrix, one layer in memory at a time.

Memory: the float32 weights of one layer and of the embedding, the hidden states of all windows (4 bytes x tokens x
hidden_size), and 8 bytes x columns^2 for each distinct input of a layer. Factors wait on disk: 4 bytes x columns^2
for each distinct input.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from entrollm.checkpoint import Checkpoint
from entrollm.engine.config import ModelConfig
from entrollm.engine.linear import DenseWeights
from entrollm.engine.walk import LayerWalk
from entrollm.engine.weights import Embedding, Floats, Linear
from entrollm.errors import EntroLLMError
from entrollm.quantize.statistics import damped_factor

# Activations of so many tokens wait for one product, which costs less than many small ones.
_TOKENS_PER_PRODUCT = 4096


class StoredFactors:
    """Factors in a folder of .npy files; see `Statistics`."""

    def __init__(self, folder: Path, fingerprint: str) -> None:
        self.fingerprint = fingerprint
        self._folder = folder
        self._files: dict[str, Path] = {}
        self._count = 0

    def factor(self, name: str) -> NDArray[np.float32] | None:
        """The factor of a matrix's inputs, or None for an embedding or head."""
        path = self._files.get(name)
        if path is None:
            return None
        factor: NDArray[np.float32] = np.load(path)
        return factor

    def add(self, names: tuple[str, ...], factor: NDArray[np.float32]) -> None:
        """Store the factor that some matrices share."""
        path = self._folder / f"{self._count}.npy"
        self._count += 1
        np.save(path, factor)
        self._files.update(dict.fromkeys(names, path))


def measure(
    checkpoint: Checkpoint,
    config: ModelConfig,
    windows: NDArray[np.int64],
    folder: Path,
    progress: Callable[[float, float], None] | None = None,
) -> StoredFactors:
    """Run a text through a model and keep what each of its matrices sees.

    Args:
        checkpoint: the model.
        config: its configuration.
        windows: token ids, shape (windows, tokens).
        folder: where the factors go; an empty folder that outlives the result.
        progress: called after each layer with the layers done and in all.
    Raises:
        EntroLLMError: activations are not finite.
        FormatError: a tensor is missing or has the wrong shape.
    """
    stored = StoredFactors(folder, hashlib.sha256(windows.tobytes()).hexdigest())
    walk = LayerWalk(config, DenseWeights(checkpoint), windows)
    for index in range(config.num_layers):
        recorder = _Recorder(checkpoint)
        walk.step(index, recorder)
        for names, moments in recorder.moments():
            if not np.isfinite(moments).all():
                raise EntroLLMError(f"{names[0]}: its inputs on the calibration text are not finite")
            stored.add(names, damped_factor(moments / windows.size))
        if progress is not None:
            progress(index + 1, config.num_layers)
    return stored


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
