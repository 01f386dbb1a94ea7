"""Fit the scales of a compressed model to its original's predictions, with the integers as they are.

The KL divergence of windows of text goes down by Adam on the logarithms of all scales. Windows run through one layer
at a time, forward and back, as in `walk.py`, so that one layer's weights are in memory at once.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from entrollm.arrays import HOST
from entrollm.calibrate.arithmetic import rms_norm, rms_norm_gradient
from entrollm.calibrate.backward import LayerGradient
from entrollm.calibrate.layer import NORM, LayerWeights, causal_mask, check_arithmetic, rotation
from entrollm.calibrate.scales import ScaledWeights, ScaleGradients
from entrollm.checkpoint.model_folder import Checkpoint
from entrollm.checkpoint.names import EMBEDDING, output_head
from entrollm.checkpoint.resolve import resolve
from entrollm.engine.files import read_model_files
from entrollm.engine.layers import LayerWalk
from entrollm.engine.linear import DenseWeights
from entrollm.engine.weights import Floats, Ids, load_linear, load_tensor
from entrollm.errors import EntroLLMError
from entrollm.format.reader import CompressedModel
from entrollm.models import read_config
from entrollm.models.config import ModelConfig
from entrollm.models.config_fields import Fields

# Windows that the gradient of one step is taken of.
_BATCH = 4
# What a step changes the logarithm of a scale by, for a divergence of 1. The errors that a scale can make up for are
# in proportion to the root of the divergence, and so are the random ones that do no harm.
_RATE = 6e-3
_WARM_UP_STEPS = 3
_MOMENTUM, _SQUARES_MOMENTUM = 0.9, 0.99
_TINY = np.float32(1e-8)

Progress = Callable[[float, float], None]


@dataclass(frozen=True)
class TuneResult:
    """What tuning did, measured on windows that it did not see, with scales as they are stored.

    Attributes:
        windows: how many were tuned on.
        kl_before, kl_after: mean KL divergence from the original, in nats.
        predictions: how many it was measured on.
        elapsed_s: wall time.
    """

    windows: int
    kl_before: float
    kl_after: float
    predictions: int
    elapsed_s: float

    @property
    def is_kept(self) -> bool:
        """Whether the tuned scales are better, and therefore to be stored."""
        return self.kl_after < self.kl_before

    def to_json(self) -> dict[str, Any]:
        """All fields, and whether the tuned scales were kept."""
        return {**asdict(self), "is_kept": self.is_kept}


class Tuner:
    """Tunes compressed models of one checkpoint, in one pass over windows of text.

    Memory, in bytes: 8 x vocabulary x hidden_size, 20 x tokens x vocabulary, 8 x the weights of one layer, and
    4 x tokens x hidden_size for each window and for four windows in each layer; tokens are those of one window.

    Args:
        model: the checkpoint, a folder or a Hub id.
        windows: token ids, shape (windows, tokens), to tune on.
        held_out: others, shape (windows, tokens), to measure on.
        threads: for the arithmetic between products; None for one per core.
    """

    def __init__(self, model: str | Path, windows: Ids, held_out: Ids, threads: int | None = None) -> None:
        self._path = resolve(model)
        self._windows = windows
        self._held_out = held_out
        self._threads = threads
        self.result: TuneResult | None = None

    def __call__(self, folder: Path, progress: Progress | None = None) -> dict[str, NDArray[Any]]:
        """Tune the model in `folder`, which stays as it is, and leave what it did in `result`.

        Args:
            folder: a compressed model.
            progress: called after each step with the windows done and in all.
        Returns:
            The scales by entry of the file, in their stored types; none where tuning did not help.
        Raises:
            EntroLLMError: a prediction is not finite.
            FormatError: a tensor is missing or has the wrong shape.
            UnsupportedError: tuning does not follow the model's architecture.
        """
        started = time.monotonic()
        config = read_config(Fields(read_model_files(folder).config, "config.json"))
        check_arithmetic(config)
        count = len(self._windows)
        # The token after the last one of a window is unknown, and not predicted in other measures either.
        windows = np.concatenate([self._windows, self._held_out])[:, :-1]
        held_out = np.arange(count, len(windows))
        order = np.random.default_rng(0).permutation(count)
        with Checkpoint.open(self._path) as checkpoint, CompressedModel.open(folder) as model:
            weights = ScaledWeights(model, self._threads)
            student = _Student(config, weights, windows, _Teacher(config, checkpoint, windows))
            before = student.divergence(held_out)
            descent = _Descent(weights, _RATE * math.sqrt(before), -(-count // _BATCH))
            for begin in range(0, count, _BATCH):
                gradients = ScaleGradients(weights)
                student.divergence(order[begin : begin + _BATCH], gradients)
                descent.step(gradients)
                if progress is not None:
                    progress(min(count, begin + _BATCH), count)
            scales = weights.rounded()
            after = student.divergence(held_out)
        self.result = TuneResult(count, before, after, windows[held_out].size, time.monotonic() - started)
        return scales if self.result.is_kept else {}


def check_tunable(model: str | Path) -> None:
    """Refuse a model whose scales cannot be tuned, before it is compressed.

    Raises:
        UnsupportedError: its layers are computed otherwise than here; the message names the difference.
    """
    check_arithmetic(read_config(Fields(read_model_files(resolve(model)).config, "config.json")))


class _Teacher:
    """The original's predictions: what its last layer gave for each window, and its head.

    Args:
        config: the model's.
        checkpoint: its tensors.
        windows: token ids, shape (windows, tokens).
    """

    def __init__(self, config: ModelConfig, checkpoint: Checkpoint, windows: Ids) -> None:
        walk = LayerWalk(config, DenseWeights(checkpoint), windows)
        for index in range(config.num_layers):
            walk.step(index, DenseWeights(checkpoint))
        self._hidden = walk.hidden
        weights = DenseWeights(checkpoint)
        head = output_head(weights, is_tied=config.tied_embeddings)
        self._head = load_tensor(weights, head, (config.vocab_size, config.hidden_size))
        self._norm = load_tensor(weights, NORM, (config.hidden_size,))
        self._eps = config.norm_eps

    def log_probabilities(self, window: int) -> Floats:
        """float32 (tokens, vocab_size)."""
        return _log_softmax(rms_norm(self._hidden[window], self._norm, self._eps) @ self._head.T)


class _Student:
    """A compressed model that reads windows, and the gradients of its divergence from its teacher."""

    def __init__(self, config: ModelConfig, weights: ScaledWeights, windows: Ids, teacher: _Teacher) -> None:
        self._config = config
        self._weights = weights
        self._windows = windows
        self._teacher = teacher
        self._tables = rotation(config, windows.shape[1], HOST)
        self._head = output_head(weights, is_tied=config.tied_embeddings)

    def divergence(self, windows: Ids, gradients: ScaleGradients | None = None) -> float:
        """The mean KL divergence over the windows of these numbers; its gradients are added where wanted.

        Raises:
            EntroLLMError: it is not finite.
        """
        if gradients is None and len(windows) > _BATCH:
            parts = [windows[begin : begin + _BATCH] for begin in range(0, len(windows), _BATCH)]
            return sum(self.divergence(part) * len(part) for part in parts) / len(windows)
        walk = LayerWalk(self._config, self._weights, self._windows[windows])
        inputs: list[list[Floats]] = []
        for index in range(self._config.num_layers):
            if gradients is not None:
                inputs.append(list(walk.hidden))
            walk.step(index, self._weights)
        divergence, passed = self._predict(walk.hidden, windows, gradients)
        if not math.isfinite(divergence):
            raise EntroLLMError("the divergence of the compressed model is not finite; its weights may be damaged")
        if gradients is not None:
            for index in reversed(range(self._config.num_layers)):
                passed = self._pass_layer(index, inputs.pop(), passed, gradients)
            embedding = self._weights.embedding(EMBEDDING)
            for ids, gradient in zip(self._windows[windows], passed, strict=True):
                gradients.add_rows(EMBEDDING, ids, embedding.rows(ids), gradient)
        # Rounding may take what is close to 0 below it.
        return max(0.0, divergence)

    def _predict(
        self, hidden: Sequence[Floats], windows: Ids, gradients: ScaleGradients | None
    ) -> tuple[float, list[Floats]]:
        """The divergence, and the gradients of what the last layer gave."""
        config = self._config
        head = load_linear(self._weights, {self._head: (config.vocab_size, config.hidden_size)})
        dense = None if gradients is None else self._weights.tensor(self._head)
        norm = self._weights.tensor(NORM)
        passed = []
        total = 0.0
        for x, window in zip(hidden, windows, strict=True):
            normed = rms_norm(x, norm, config.norm_eps)
            logits = head(normed)
            found, wanted = _log_softmax(logits), self._teacher.log_probabilities(int(window))
            likely = np.exp(wanted)
            wanted -= found
            total += float(np.einsum("ij,ij->", likely, wanted, dtype=np.float64)) / len(x)
            if gradients is not None and dense is not None:
                np.exp(found, out=found)
                found -= likely
                found /= np.float32(len(x) * len(windows))
                inner = found @ dense
                gradients.add(self._head, np.einsum("ij,ij->j", found, logits), np.einsum("ij,ij->j", inner, normed))
                passed.append(rms_norm_gradient(x, norm, config.norm_eps, inner))
        return total / len(windows), passed

    def _pass_layer(
        self, index: int, inputs: Sequence[Floats], passed: Sequence[Floats], gradients: ScaleGradients
    ) -> list[Floats]:
        """The gradients of what a layer read, given those of what it gave."""
        read = self._weights.read
        weights = LayerWeights(self._config, read, read, index)
        layer = LayerGradient(weights, self._tables, causal_mask(self._windows.shape[1], weights.window))
        sums: dict[str, Floats] = {}

        def record(name: str, x: Floats, gradient: Floats) -> None:
            sums[name] = sums.get(name, np.float32(0)) + gradient.T @ x

        found = [layer(x, gradient, record) for x, gradient in zip(inputs, passed, strict=True)]
        for name, gradient in sums.items():
            gradients.add_matrix(name, self._weights.tensor(name), gradient)
        return found


class _Descent:
    """Adam on the logarithms of scales, at a rate that warms up and falls along a cosine to 0 after so many steps."""

    def __init__(self, weights: ScaledWeights, rate: float, steps: int) -> None:
        self._weights = weights
        self._rate = rate
        self._steps = steps
        self._taken = 0
        self._mean = ScaleGradients(weights).sums
        self._square = ScaleGradients(weights).sums

    def step(self, gradients: ScaleGradients) -> None:
        """Move all scales."""
        fall = (1 + math.cos(math.pi * self._taken / self._steps)) / 2
        self._taken += 1
        rate = self._rate * fall * min(1.0, self._taken / _WARM_UP_STEPS)
        bias, square_bias = 1 - _MOMENTUM**self._taken, 1 - _SQUARES_MOMENTUM**self._taken
        for entry, gradient in gradients.sums.items():
            mean, square = self._mean[entry], self._square[entry]
            mean += (1 - _MOMENTUM) * (gradient - mean)
            square += (1 - _SQUARES_MOMENTUM) * (np.square(gradient) - square)
            direction = (mean / bias) / (np.sqrt(square / square_bias) + _TINY)
            self._weights.scales[entry] *= np.exp(np.float32(-rate) * direction)


def _log_softmax(logits: Floats) -> Floats:
    """Over the last axis, into a new array."""
    shifted: Floats = logits - logits.max(axis=1, keepdims=True)
    shifted -= np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return shifted
