"""The quantizer of each matrix: a paper grid, the integers that it has already, or a step that meets a size."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Protocol

import numpy as np

from entrollm import _core
from entrollm.checkpoint.model_folder import Checkpoint
from entrollm.compress.lossless import LosslessQuantizer
from entrollm.compress.options import CodingOptions
from entrollm.compress.planning import Plan
from entrollm.compress.sized import SizedMethods
from entrollm.compress.statistics import Statistics
from entrollm.quantize.method import CodeChooser, Float32, Quantized, Quantizer, RowSource, sum_counts
from entrollm.quantize.paper import PaperQuantizer
from entrollm.quantize.select import TensorPlan

_GRID_PREFIX = "imported-"


class Methods(Protocol):
    """The quantizers of one run. Matrices are coded in the order of the plan."""

    def quantizer(self, name: str) -> Quantizer:
        """The quantizer of a matrix."""

    def settle(self, name: str, stored_bytes: int) -> bool:
        """Record the size of a matrix that was coded; False if it must be coded again, with a new quantizer."""

    def resume(self, name: str, stored_bytes: int, weights: Callable[[], Float32]) -> None:
        """Record a matrix that an earlier run has coded; `weights` reads it, and may be called later or never."""


def make_methods(
    checkpoint: Checkpoint, plan: Plan, options: CodingOptions, statistics: Statistics | None = None
) -> Methods:
    """The quantizers that the options ask for.

    Args:
        checkpoint: the model.
        plan: what becomes of its tensors.
        options: of compression.
        statistics: what calibration measured; None if absent.
    Raises:
        ValueError: the target is out of reach.
    """
    if plan.lossless:
        others = tuple(name for name in plan.coded if name not in plan.lossless)
        rest = make_methods(checkpoint, replace(plan, coded=others), options, statistics)
        return LosslessMethods(checkpoint, plan.lossless, rest)
    if plan.imported:
        return ImportedMethods(checkpoint, plan)
    if options.target is None:
        return PaperMethods(plan.tensors)
    return SizedMethods(checkpoint, plan, options, statistics)


class LosslessMethods:
    """The bits of lossless matrices; other methods for the other matrices."""

    def __init__(self, checkpoint: Checkpoint, names: frozenset[str], rest: Methods) -> None:
        self._lossless = LosslessQuantizer(checkpoint)
        self._names = names
        self._rest = rest

    def quantizer(self, name: str) -> Quantizer:
        """The quantizer of a matrix."""
        return self._lossless if name in self._names else self._rest.quantizer(name)

    def settle(self, name: str, stored_bytes: int) -> bool:
        """Accept any size of a lossless matrix."""
        return name in self._names or self._rest.settle(name, stored_bytes)

    def resume(self, name: str, stored_bytes: int, weights: Callable[[], Float32]) -> None:
        """Record a matrix that is not lossless."""
        if name not in self._names:
            self._rest.resume(name, stored_bytes, weights)


class PaperMethods:
    """The grids of the paper, as planned for each tensor. Matrices do not depend on each other."""

    def __init__(self, plans: Mapping[str, TensorPlan]) -> None:
        self._plans = plans

    def quantizer(self, name: str) -> Quantizer:
        """The planned grid of a matrix."""
        plan = self._plans[name]
        assert plan.bits is not None
        return PaperQuantizer(plan.bits, plan.granularity)

    def settle(self, name: str, stored_bytes: int) -> bool:
        """Accept any size."""
        return True

    def resume(self, name: str, stored_bytes: int, weights: Callable[[], Float32]) -> None:
        """Do nothing."""


class ImportedMethods(PaperMethods):
    """The integers of imported matrices; paper grids for the other matrices."""

    def __init__(self, checkpoint: Checkpoint, plan: Plan) -> None:
        super().__init__(plan.tensors)
        self._checkpoint = checkpoint
        self._imported = plan.imported

    def quantizer(self, name: str) -> Quantizer:
        """The quantizer of a matrix."""
        return ImportedQuantizer(self._checkpoint) if name in self._imported else super().quantizer(name)


class ImportedQuantizer:
    """Takes over the integers and scales of imported matrices."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint

    def quantize(self, source: RowSource, choose: CodeChooser) -> Quantized:
        """The integers of an imported matrix, which have no error.

        Raises:
            FormatError: its tensors in the checkpoint are malformed.
        """
        found = self._checkpoint.read_imported(source.name)
        counts = sum_counts(source.map(lambda rows: _core.histogram(found.symbols[rows[0] : rows[1]])))
        grid = f"{_GRID_PREFIX}{self._checkpoint.quantization}"
        scale = np.ones(1, np.float32)
        return Quantized(found.symbols, counts, grid, scale, error=0.0, energy=0.0, groups=found.groups)
