"""Fit the scales of a compressed model to its original's predictions, with the integers as they are.

The KL divergence of windows of text goes down by Adam on the logarithms of all scales.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from entrollm.arrays import HOST, Device
from entrollm.calibrate.network import empty_model
from entrollm.calibrate.scales import Floats, MovingScales
from entrollm.calibrate.store import Spool
from entrollm.calibrate.student import Gradients, Student
from entrollm.checkpoint.model_folder import Checkpoint
from entrollm.checkpoint.resolve import resolve
from entrollm.errors import UnsupportedError
from entrollm.format.reader import CompressedModel
from entrollm.processes import share
from entrollm.system import scratch_folder
from entrollm.torch.device import TorchDevice

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

    Memory: that of `Student`, and 20 bytes x vocabulary for each prediction of a batch of windows. On disk: the hidden
    states of four windows before each layer, and their predictions.

    Args:
        model: the checkpoint, a folder or a Hub id.
        windows: token ids, shape (windows, tokens), to tune on.
        held_out: others, shape (windows, tokens), to measure on.
        device: what computes; processes that share it tune together, each on a part of the windows.
        threads: to decode on; None for one per core.
    """

    def __init__(
        self,
        model: str | Path,
        windows: NDArray[np.int64],
        held_out: NDArray[np.int64],
        device: Device = HOST,
        threads: int | None = None,
    ) -> None:
        self._path = resolve(model)
        # The token after the last one of a window is unknown, and not predicted in other measures either.
        self._windows, self._held_out = windows[:, :-1], held_out[:, :-1]
        self._group = device.group
        self._device = device if isinstance(device, TorchDevice) else TorchDevice("cpu")
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
            EntroLLMError: a prediction is not finite, or a model that cannot be walked does not fit the memory.
            FormatError: a tensor is missing or has the wrong shape.
            UnsupportedError: the layers that run depend on the text.
        """
        started = time.monotonic()
        count = len(self._windows)
        order = np.random.default_rng(0).permutation(count)
        with (
            Checkpoint.open(self._path) as checkpoint,
            CompressedModel.open(folder) as model,
            scratch_folder("entrollm-tuning-") as scratch,
        ):
            scales = MovingScales(model, self._threads)
            student = Student(checkpoint, scales, Spool(scratch, self._device), self._device)
            before = self._measure(student)
            descent = _Descent(scales, _RATE * math.sqrt(before), -(-count // _BATCH))
            for begin in range(0, count, _BATCH):
                gradients = _zeros(scales)
                self._divergence(student, self._windows[order[begin : begin + _BATCH]], gradients)
                descent.step(gradients)
                if progress is not None:
                    progress(min(count, begin + _BATCH), count)
            rounded = scales.rounded()
            after = self._measure(student)
        self.result = TuneResult(count, before, after, self._held_out.size, time.monotonic() - started)
        return rounded if self.result.is_kept else {}

    def _measure(self, student: Student) -> float:
        """The divergence over the windows held out."""
        parts = [self._held_out[begin : begin + _BATCH] for begin in range(0, len(self._held_out), _BATCH)]
        return sum(self._divergence(student, part) * len(part) for part in parts) / len(self._held_out)

    def _divergence(self, student: Student, windows: NDArray[np.int64], gradients: Gradients | None = None) -> float:
        """The mean divergence over the windows, of which each process takes a part; adds to gradients as well."""
        own = share(windows, self._group)
        part = len(own) / len(windows)
        mean = part * student.divergence(own, gradients) if len(own) else 0.0
        for gradient in () if gradients is None else gradients.values():
            gradient *= part
            self._group.sum(gradient)
        return sum(self._group.gather(mean))


def check_predicts(model: str | Path, purpose: str) -> None:
    """Refuse a model that predicts no tokens before it is calibrated.

    Args:
        model: a folder or a Hub id.
        purpose: what needs predictions.
    Raises:
        UnsupportedError: transformers does not know it, or it predicts no tokens.
    """
    path = resolve(model)
    with Checkpoint.open(path) as checkpoint:
        network = empty_model(checkpoint)
    if network.get_output_embeddings() is None:
        raise UnsupportedError(
            f"{path}: {type(network).__name__} predicts no tokens, which {purpose} needs; compress it without"
        )


class _Descent:
    """Adam on the logarithms of scales, at a rate that warms up and falls along a cosine to 0 after so many steps."""

    def __init__(self, scales: MovingScales, rate: float, steps: int) -> None:
        self._scales = scales
        self._rate = rate
        self._steps = steps
        self._taken = 0
        self._mean, self._square = _zeros(scales), _zeros(scales)

    def step(self, gradients: Gradients) -> None:
        """Move all scales."""
        fall = (1 + math.cos(math.pi * self._taken / self._steps)) / 2
        self._taken += 1
        rate = self._rate * fall * min(1.0, self._taken / _WARM_UP_STEPS)
        bias, square_bias = 1 - _MOMENTUM**self._taken, 1 - _SQUARES_MOMENTUM**self._taken
        for entry, gradient in gradients.items():
            mean, square = self._mean[entry], self._square[entry]
            mean += (1 - _MOMENTUM) * (gradient - mean)
            square += (1 - _SQUARES_MOMENTUM) * (np.square(gradient) - square)
            direction = (mean / bias) / (np.sqrt(square / square_bias) + _TINY)
            self._scales.values[entry] *= np.exp(np.float32(-rate) * direction)


def _zeros(scales: MovingScales) -> dict[str, Floats]:
    return {entry: np.zeros_like(values) for entry, values in scales.values.items()}
