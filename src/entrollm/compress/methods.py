"""Which quantizer each matrix gets: a paper grid of given bits, or a step that meets an asked size."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from entrollm.arrays import Array
from entrollm.checkpoint.model_folder import Checkpoint
from entrollm.compress.control import RateControl
from entrollm.compress.options import CompressOptions
from entrollm.compress.rate import RateCurve
from entrollm.quantize.ecsq import EcsqQuantizer
from entrollm.quantize.feedback import FeedbackQuantizer
from entrollm.quantize.gptq import GptqQuantizer
from entrollm.quantize.importance import relative_steps, row_precision
from entrollm.quantize.method import ArraySource, CodeChooser, Float32, Quantized, Quantizer, RowSource
from entrollm.quantize.paper import PaperQuantizer
from entrollm.quantize.select import TensorPlan
from entrollm.quantize.statistics import Drift, Sensitivity, Statistics

# Weights of a matrix that its rate is predicted from.
_SAMPLE_WEIGHTS = 1 << 16
_FEWEST_ROWS = 32
_PLAIN_ENTRY_BYTES = 90
_SHARD_BYTES = 140


class Methods(Protocol):
    """The quantizers of one run, asked for in the order of coding."""

    def quantizer(self, name: str) -> Quantizer:
        """The quantizer of a matrix."""

    def settle(self, name: str, stored_bytes: int) -> bool:
        """Take note of what a matrix took in the file; False asks for it to be coded again."""

    def resume(self, name: str, stored_bytes: int, weights: Callable[[], Float32]) -> None:
        """Take note of a matrix that an earlier run has finished; `weights` reads it, perhaps later."""


class PaperMethods:
    """The grids of the paper, as planned per tensor."""

    def __init__(self, plans: Mapping[str, TensorPlan]) -> None:
        self._plans = plans

    def quantizer(self, name: str) -> Quantizer:
        """The grid that is planned for the matrix."""
        plan = self._plans[name]
        assert plan.bits is not None
        return PaperQuantizer(plan.bits, plan.granularity)

    def settle(self, name: str, stored_bytes: int) -> bool:
        """Accept any size."""
        return True

    def resume(self, name: str, stored_bytes: int, weights: Callable[[], Float32]) -> None:
        """Do nothing: matrices do not depend on each other."""


class SizedMethods:
    """Entropy-coded scalar quantization at the steps that meet a target, with feedback where statistics allow.

    Args:
        checkpoint: the model.
        names: its matrices, in the order of coding.
        kept: its other tensors.
        options: with a target.
        shards: files that the output will have.
        statistics: what calibration measured; None for none.
    Raises:
        ValueError: the target is out of reach.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        names: list[str],
        kept: list[str],
        options: CompressOptions,
        shards: int,
        statistics: Statistics | None = None,
    ) -> None:
        self._checkpoint = checkpoint
        self._statistics = statistics
        self._method = options.method
        # Such grids are no faster to decode, and other codes waste bits for other reasons.
        self._grid = {"fits_code": options.prefer == "size", "fine_scales": options.fine_scales}
        self._last: tuple[str, Array | None] = ("", None)
        self._drift = statistics.drift(checkpoint) if statistics is not None and has_drift(options) else None
        self._final = names[-1] if names else ""
        assert options.target is not None
        shapes = {name: _matrix_shape(checkpoint, name) for name in names}
        self.curves = {
            name: RateCurve(name, shapes[name], _Sampler(checkpoint, name, self).quantize, options.prefer)
            for name in names
        }
        fixed = shards * _SHARD_BYTES
        for name in kept:
            fixed += checkpoint.tensors[name].size_bytes + _PLAIN_ENTRY_BYTES + 2 * len(json.dumps(name))
        weights = sum(_count(info.shape) for info in checkpoint.tensors.values())
        steps = relative_steps(shapes, _sensitivities(names, statistics))
        self.control = RateControl(self.curves, steps, fixed, weights, options.target)

    def quantizer(self, name: str) -> Quantizer:
        """The quantizer of a matrix at its step."""
        quantizer = self.at_step(name, self.control.step(name), self.row_precision(name))
        if self._drift is None or not isinstance(quantizer, FeedbackQuantizer):
            return quantizer
        return _Corrected(name, quantizer, self._drift)

    def settle(self, name: str, stored_bytes: int) -> bool:
        """Let the rate control take note."""
        is_settled = self.control.settle(name, stored_bytes)
        if is_settled and name == self._final:
            self._drift = None  # it holds the hidden states of all windows
        return is_settled

    def resume(self, name: str, stored_bytes: int, weights: Callable[[], Float32]) -> None:
        """Let the rate control and the matrices after this one take note."""
        self.control.settle(name, stored_bytes)
        if self._drift is not None:
            self._drift.record(name, weights)

    def row_precision(self, name: str) -> NDArray[np.float32] | None:
        """What the rows of a matrix divide their steps by."""
        sensitivity = None if self._statistics is None else self._statistics.sensitivity(name)
        return row_precision(name, self._checkpoint.tensors[name].shape[0], sensitivity)

    def at_step(
        self, name: str, step: float, precision: NDArray[np.float32] | None, is_draft: bool = False
    ) -> Quantizer:
        """The quantizer of a matrix, or of some of its rows with their precision, at a step."""
        factor = self._factor(name)
        if self._statistics is None or factor is None:
            return EcsqQuantizer(step, precision, **self._grid)
        device = self._statistics.device
        if self._method == "gptq":
            return GptqQuantizer(step, factor, precision, device)
        return FeedbackQuantizer(step, factor, precision, **self._grid, device=device, is_draft=is_draft)

    def _factor(self, name: str) -> Array | None:
        """The factor of a matrix; the last one is kept, since a matrix is quantized at several steps in turn."""
        if self._statistics is None:
            return None
        if name != self._last[0]:
            self._last = ("", None)  # before the next one takes memory
            self._last = (name, self._statistics.factor(name))
        return self._last[1]


@dataclass(frozen=True)
class _Corrected:
    """Feedback on a matrix that makes up for what those before it have become."""

    name: str
    inner: FeedbackQuantizer
    drift: Drift

    def quantize(self, source: RowSource, choose: CodeChooser) -> Quantized:
        """Quantize the matrix, for those after it to take note of."""
        quantized = replace(self.inner, correction=self.drift.correction(self.name)).quantize(source, choose)
        self.drift.record(self.name, quantized.weights)
        return quantized


def has_drift(options: CompressOptions) -> bool:
    """Whether matrices with statistics are to be quantized in the order in which the model multiplies with them."""
    return options.drift and options.method == "feedback"


def _sensitivities(names: list[str], statistics: Statistics | None) -> dict[str, Sensitivity]:
    if statistics is None:
        return {}
    found = {name: statistics.sensitivity(name) for name in names}
    return {name: sensitivity for name, sensitivity in found.items() if sensitivity is not None}


class _Sampler:
    """Rows of one matrix, evenly spread, read when they are first needed."""

    def __init__(self, checkpoint: Checkpoint, name: str, methods: SizedMethods) -> None:
        self._checkpoint = checkpoint
        self._methods = methods
        self._name = name
        self._rows: NDArray[Any] | None = None
        rows, columns = _matrix_shape(checkpoint, name)
        self._picked = np.unique(
            np.linspace(0, rows - 1, min(rows, max(_FEWEST_ROWS, _SAMPLE_WEIGHTS // columns))).astype(int)
        )
        precision = methods.row_precision(name)
        self._precision = None if precision is None else precision[self._picked]

    def quantize(self, step: float, choose: CodeChooser) -> Quantized:
        if self._rows is None:
            parts = [self._checkpoint.read_float32(self._name, int(i), int(i) + 1) for i in self._picked]
            self._rows = np.concatenate(parts).astype(_sample_type(self._checkpoint, self._name))
            self._checkpoint.release(self._name)
        quantizer = self._methods.at_step(self._name, step, self._precision, is_draft=True)
        return quantizer.quantize(ArraySource(self._name, self._rows), choose)


def _sample_type(checkpoint: Checkpoint, name: str) -> Any:
    """Half the memory where the weights are bf16 anyway."""
    return ml_dtypes.bfloat16 if checkpoint.tensors[name].dtype == "BF16" else np.float32


def _matrix_shape(checkpoint: Checkpoint, name: str) -> tuple[int, int]:
    rows, columns = checkpoint.tensors[name].shape
    return rows, columns


def _count(shape: tuple[int, ...]) -> int:
    count = 1
    for length in shape:
        count *= length
    return count
