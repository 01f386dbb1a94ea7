"""Take over the integers of a checkpoint that is quantized already."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import numpy as np

from entrollm import _core
from entrollm.checkpoint.imported import PackedMatrix
from entrollm.checkpoint.model_folder import Checkpoint
from entrollm.compress.methods import Methods
from entrollm.compress.options import CompressOptions
from entrollm.quantize.method import CodeChooser, Float32, Quantized, Quantizer, RowSource, sum_counts
from entrollm.quantize.select import BitsOverride, TensorPlan, plan_tensors

_GRID_PREFIX = "imported-"


@dataclass(frozen=True, slots=True)
class PackedSummary:
    """What became of the matrices that were quantized already; bits are per weight of theirs.

    Attributes:
        format: how they were quantized, such as GPTQ.
        weights: how many weights they have.
        source_bits: what they took in the checkpoint, scales included.
        stored_bits: what they take now, scales and headers included.
        entropy_bits: of their integers.
    """

    format: str
    weights: int
    source_bits: float
    stored_bits: float
    entropy_bits: float


class PackedQuantizer:
    """Takes the integers and scales of packed matrices as they are."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint

    def quantize(self, source: RowSource, choose: CodeChooser) -> Quantized:
        """The stored integers of a packed matrix.

        Raises:
            FormatError: its parts are malformed.
        """
        stored = self._checkpoint.read_packed(source.name)
        counts = sum_counts(source.map(lambda rows: _core.histogram(stored.symbols[rows[0] : rows[1]])))
        grid = f"{_GRID_PREFIX}{self._checkpoint.quantization}"
        scale = np.ones(1, np.float32)
        return Quantized(stored.symbols, counts, grid, scale, error=0.0, energy=0.0, groups=stored.groups)


class PackedMethods:
    """Packed matrices keep their integers; `others` has the quantizers of the rest."""

    def __init__(self, checkpoint: Checkpoint, taken: Mapping[str, PackedMatrix], others: Methods) -> None:
        self._checkpoint = checkpoint
        self._taken = taken
        self._others = others

    def quantizer(self, name: str) -> Quantizer:
        """The quantizer of a matrix."""
        return PackedQuantizer(self._checkpoint) if name in self._taken else self._others.quantizer(name)

    def settle(self, name: str, stored_bytes: int) -> bool:
        """Accept any size."""
        return True

    def resume(self, name: str, stored_bytes: int, weights: Callable[[], Float32]) -> None:
        """Do nothing: matrices do not depend on each other."""


def taken_over(checkpoint: Checkpoint, options: CompressOptions) -> Mapping[str, PackedMatrix]:
    """The matrices whose integers, or fp8 bytes, are taken over; those of fp8 only where no other size is asked for."""
    if checkpoint.packed or options.bits is not None or options.target is not None:
        return checkpoint.packed
    return checkpoint.fp8


def plan_packed(
    checkpoint: Checkpoint, taken: Mapping[str, PackedMatrix], options: CompressOptions
) -> dict[str, TensorPlan]:
    """Plan a checkpoint that is quantized already: `taken` matrices are taken over, others kept unless named.

    Raises:
        ValueError: the options would quantize a second time.
    """
    where = f"{checkpoint.path} is quantized already ({checkpoint.quantization}), and its integers are kept"
    if options.target is not None or options.bits is not None:
        raise ValueError(
            f"{where}: leave out --bits, --bpw and --fit, or compress the checkpoint that it was made from; "
            "--bits GLOB=N quantizes the tensors that it left alone"
        )
    plain = {name: info.shape for name, info in checkpoint.tensors.items() if name not in taken}
    for override in options.overrides:
        if not any(fnmatchcase(name, override.pattern) for name in plain):
            raise ValueError(
                f"{where}; the pattern {override.pattern!r} matches none of the {len(plain)} other tensors"
            )
    overrides = [BitsOverride("*", None), *options.overrides] if plain else []
    plans = plan_tensors(plain, 4, overrides, options.granularity)
    return {name: plans.get(name, TensorPlan(None, is_packed=True)) for name in checkpoint.tensors}


def summarize_packed(
    checkpoint: Checkpoint, taken: Mapping[str, PackedMatrix], matrices: Mapping[str, Mapping[str, Any]]
) -> PackedSummary | None:
    """Add up what became of the matrices that were taken over; None where there are none.

    Args:
        checkpoint: the source.
        taken: from `taken_over`.
        matrices: by name, the stored_bytes and entropy_bits of every coded matrix.
    """
    if checkpoint.quantization is None or not taken:
        return None
    weights = {name: matrix.shape[0] * matrix.shape[1] for name, matrix in taken.items()}
    total = sum(weights.values())
    source_bytes = sum(checkpoint.entries[part].size_bytes for matrix in taken.values() for part in matrix.parts)
    return PackedSummary(
        format=checkpoint.quantization,
        weights=total,
        source_bits=source_bytes * 8 / total,
        stored_bits=sum(matrices[name]["stored_bytes"] for name in weights) * 8 / total,
        entropy_bits=sum(matrices[name]["entropy_bits"] * count for name, count in weights.items()) / total,
    )
