"""Quantizers whose steps make the whole model meet a size."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from entrollm.arrays import Array
from entrollm.checkpoint.model_folder import Checkpoint
from entrollm.codec.choose import is_flat_preferred
from entrollm.compress.control import RateControl
from entrollm.compress.lossless import expected_bytes
from entrollm.compress.options import CodingOptions
from entrollm.compress.planning import Plan
from entrollm.compress.rate import RateCurve
from entrollm.compress.statistics import Drift, Statistics
from entrollm.quantize.ecsq import EcsqQuantizer
from entrollm.quantize.feedback import FeedbackQuantizer
from entrollm.quantize.gptq import GptqQuantizer
from entrollm.quantize.grid import CodeFit
from entrollm.quantize.importance import relative_steps, row_precision
from entrollm.quantize.method import ArraySource, CodeChooser, Float32, Quantized, Quantizer, RowSource
from entrollm.quantize.statistics import Sensitivity

# The rate of a matrix is predicted from about this many of its weights, and at least this many rows.
_SAMPLE_WEIGHTS = 1 << 16
_FEWEST_ROWS = 32
# Bytes that a plain tensor, besides its name, and a shard take in headers.
_PLAIN_ENTRY_BYTES = 90
_SHARD_BYTES = 140


class SizedMethods:
    """Entropy-coded scalar quantization at the steps that meet a target, with feedback for calibrated matrices.

    Args:
        checkpoint: the model.
        plan: what becomes of its tensors.
        options: of compression, with a target.
        statistics: what calibration measured; None if absent.
    Raises:
        ValueError: the target is out of reach.
    """

    def __init__(
        self, checkpoint: Checkpoint, plan: Plan, options: CodingOptions, statistics: Statistics | None = None
    ) -> None:
        self._checkpoint = checkpoint
        self._statistics = statistics
        self._method = options.method
        self._fits = _fits(options)
        self._fine_scales = options.fine_scales
        self._trellis = options.trellis
        self._last: tuple[str, Array | None] = ("", None)
        self._drift = statistics.drift(checkpoint) if statistics is not None and has_drift(options) else None
        self._final = plan.coded[-1] if plan.coded else ""
        assert options.target is not None
        shapes = {name: _matrix_shape(checkpoint, name) for name in plan.coded}
        self.curves = {
            name: RateCurve(
                name, shapes[name], _Sampler(checkpoint, name, self).quantize, options.prefer, options.processor
            )
            for name in plan.coded
        }
        fixed = len(plan.shards) * _SHARD_BYTES
        for name in plan.kept:
            is_lossless = plan.tensors[name].is_lossless
            own = expected_bytes(checkpoint, name) if is_lossless else checkpoint.tensors[name].size_bytes
            fixed += own + _PLAIN_ENTRY_BYTES + 2 * len(json.dumps(name))
        weights = sum(info.weights for info in checkpoint.tensors.values())
        steps = relative_steps(shapes, _sensitivities(plan.coded, statistics))
        self.control = RateControl(
            self.curves, steps, fixed, weights, options.target, chooses_steps=self._fits == "flat"
        )

    def quantizer(self, name: str) -> Quantizer:
        """The quantizer of a matrix at its step."""
        quantizer = self.at_step(name, self.control.step(name), self.row_precision(name))
        if self._drift is None or not isinstance(quantizer, FeedbackQuantizer):
            return quantizer
        return _Corrected(name, quantizer, self._drift)

    def settle(self, name: str, stored_bytes: int) -> bool:
        """Tell the rate control the size of a matrix."""
        is_settled = self.control.settle(name, stored_bytes)
        if is_settled and name == self._final:
            self._drift = None  # frees the hidden states of all windows
        return is_settled

    def resume(self, name: str, stored_bytes: int, weights: Callable[[], Float32]) -> None:
        """Tell the rate control and the drift of later matrices about a matrix that is coded already."""
        self.control.settle(name, stored_bytes)
        if self._drift is not None:
            self._drift.record(name, weights)

    def row_precision(self, name: str) -> NDArray[np.float32] | None:
        """What the steps of the rows of a matrix are divided by; None if all rows are alike."""
        sensitivity = None if self._statistics is None else self._statistics.sensitivity(name)
        return row_precision(name, self._checkpoint.tensors[name].shape[0], sensitivity)

    def at_step(
        self, name: str, step: float, precision: NDArray[np.float32] | None, is_draft: bool = False
    ) -> Quantizer:
        """The quantizer of a matrix, or of some of its rows, at a step.

        Args:
            name: the matrix.
            step: over the RMS of the matrix.
            precision: `row_precision` of the rows.
            is_draft: whether only the histogram of the integers is needed.
        """
        factor = self._factor(name)
        plain = EcsqQuantizer(step, precision, fits=self._fits, fine_scales=self._fine_scales, trellis=self._trellis)
        if self._statistics is None or factor is None:
            return plain
        device = self._statistics.device
        if self._method == "light":
            sizes = np.sqrt(np.square(device.take(factor)).sum(axis=1))
            return replace(plain, column_sizes=sizes)
        if self._method == "gptq":
            return GptqQuantizer(step, factor, precision, device)
        return FeedbackQuantizer(
            step,
            factor,
            precision,
            fits=self._fits,
            fine_scales=self._fine_scales,
            device=device,
            is_draft=is_draft,
            trellis=self._trellis,
        )

    def _factor(self, name: str) -> Array | None:
        """The factor of a matrix; the last one is kept, since a matrix is quantized at several steps in a row."""
        if self._statistics is None:
            return None
        if name != self._last[0]:
            self._last = ("", None)  # frees memory for the next factor
            self._last = (name, self._statistics.factor(name))
        return self._last[1]


@dataclass(frozen=True)
class _Corrected:
    """Quantizes a matrix with feedback, compensating for the errors of the matrices before it."""

    name: str
    inner: FeedbackQuantizer
    drift: Drift

    def quantize(self, source: RowSource, choose: CodeChooser) -> Quantized:
        """Quantize the matrix, and record what it became for the matrices after it."""
        correction = self.drift.correction(self.name)
        quantized = replace(self.inner, correction=correction).quantize(source, choose)
        # The walk takes a corrected matrix before it goes on, so that a GPU keeps one of them at most.
        dense = None if correction is None else quantized.dense
        self.drift.record(self.name, quantized.weights if dense is None else lambda: dense)
        return quantized


def _fits(options: CodingOptions) -> CodeFit:
    if is_flat_preferred(options.prefer, options.processor):
        return "flat"
    # Codes for other preferences decode no faster on fitted grids, and waste bits for other reasons.
    return "prefix" if options.prefer == "size" else "none"


def has_drift(options: CodingOptions) -> bool:
    """Whether matrices with statistics must be quantized in the order in which the model multiplies with them."""
    return options.drift and options.method == "feedback"


def _sensitivities(names: Iterable[str], statistics: Statistics | None) -> dict[str, Sensitivity]:
    if statistics is None:
        return {}
    found = {name: statistics.sensitivity(name) for name in names}
    return {name: sensitivity for name, sensitivity in found.items() if sensitivity is not None}


class _Sampler:
    """Evenly spaced rows of one matrix, read when they are first needed."""

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
            rows = [self._checkpoint.read_weights(self._name, int(i), int(i) + 1) for i in self._picked]
            self._rows = np.concatenate(rows)
            self._checkpoint.release(self._name)
        quantizer = self._methods.at_step(self._name, step, self._precision, is_draft=True)
        return quantizer.quantize(ArraySource(self._name, self._rows), choose)


def _matrix_shape(checkpoint: Checkpoint, name: str) -> tuple[int, int]:
    rows, columns = checkpoint.tensors[name].shape
    return rows, columns
