"""What a compression run did."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from entrollm.checkpoint.model_folder import Checkpoint
from entrollm.compress.planning import Plan
from entrollm.compress.shard import MatrixRecord, ShardRecord


@dataclass(frozen=True, slots=True)
class ImportedSummary:
    """What became of the imported matrices. Bits are per weight of these.

    Attributes:
        format: how they were quantized, such as GPTQ.
        weights: how many weights they have.
        source_bits: what they take in the checkpoint, scales included.
        stored_bits: what they take now, scales and headers included.
        entropy_bits: the entropy of their integers.
    """

    format: str
    weights: int
    source_bits: float
    stored_bits: float
    entropy_bits: float


@dataclass(frozen=True, slots=True)
class MatrixError:
    """The relative error of one matrix: RMS quantization error over the RMS of its weights."""

    name: str
    relative_error: float


@dataclass(frozen=True, slots=True)
class FolderResult:
    """What a run did.

    Attributes:
        path: the model folder.
        weights: weights of the whole model; quantized_weights of them are coded.
        source_bytes, file_bytes: sizes of the weight files, headers included.
        file_bits: file_bytes * 8 / weights.
        entropy_bits, huffman_bits: per coded weight, averaged over all of them.
        coded_bits: stored bits per coded weight: streams, sizes, scales and headers.
        elapsed_s: wall time of this run, without a post_fit; an earlier run finished resumed_weights.
        imported: what became of the imported matrices; None if there were none.
        is_refitted: whether the scales of a post_fit are stored; it may have returned none, or they took too much.
        relative_error: of the matrices, the root of the mean of its squares over all coded weights.
        worst: the matrix with the largest relative error; None if none was coded.
    """

    path: Path
    weights: int
    quantized_weights: int
    source_bytes: int
    file_bytes: int
    file_bits: float
    entropy_bits: float
    huffman_bits: float
    coded_bits: float
    elapsed_s: float
    resumed_weights: int
    imported: ImportedSummary | None = None
    is_refitted: bool = False
    relative_error: float = 0.0
    worst: MatrixError | None = None

    def to_json(self) -> dict[str, Any]:
        """All fields, the path as text; the key of `imported` is "packed"."""
        fields = {**asdict(self), "path": str(self.path)}
        fields["packed"] = fields.pop("imported")
        return fields


@dataclass(frozen=True, slots=True)
class Run:
    """What `summarize` needs to know of a run besides its records; see `FolderResult`."""

    path: Path
    elapsed_s: float
    resumed_weights: int
    is_refitted: bool


def summarize(checkpoint: Checkpoint, plan: Plan, records: Sequence[ShardRecord], run: Run) -> FolderResult:
    """Add up the records of all shards."""
    matrices = {name: matrix for record in records for name, matrix in record.matrices.items()}
    coded = sum(record.coded_weights for record in records)
    file_bytes = sum(record.file_bytes for record in records)
    kept_bytes = sum(record.kept_bytes for record in records)
    weights = sum(info.weights for info in checkpoint.tensors.values())
    return FolderResult(
        path=run.path,
        weights=weights,
        quantized_weights=coded,
        source_bytes=checkpoint.file_bytes(),
        file_bytes=file_bytes,
        file_bits=file_bytes * 8 / max(1, weights),
        entropy_bits=_mean([(matrix.entropy_bits, matrix.weights) for matrix in matrices.values()]),
        huffman_bits=_mean([(matrix.huffman_bits, matrix.weights) for matrix in matrices.values()]),
        coded_bits=(file_bytes - kept_bytes) * 8 / coded if coded else 0.0,
        elapsed_s=run.elapsed_s,
        resumed_weights=run.resumed_weights,
        imported=_summarize_imported(checkpoint, plan, matrices),
        is_refitted=run.is_refitted,
        relative_error=math.sqrt(_mean([(matrix.relative_error**2, matrix.weights) for matrix in matrices.values()])),
        worst=worst_error({name: matrix.relative_error for name, matrix in matrices.items()}),
    )


def worst_error(errors: Mapping[str, float]) -> MatrixError | None:
    """The largest of the relative errors of matrices by name; None if there are none."""
    name = max(errors, key=lambda name: errors[name], default=None)
    return None if name is None else MatrixError(name, errors[name])


def _summarize_imported(
    checkpoint: Checkpoint, plan: Plan, matrices: Mapping[str, MatrixRecord]
) -> ImportedSummary | None:
    if checkpoint.quantization is None or not plan.imported:
        return None
    imported = [matrices[name] for name in plan.imported]
    weights = sum(matrix.weights for matrix in imported)
    sources = [source for matrix in plan.imported.values() for source in matrix.sources]
    return ImportedSummary(
        format=checkpoint.quantization,
        weights=weights,
        source_bits=sum(checkpoint.entries[source].size_bytes for source in sources) * 8 / weights,
        stored_bits=sum(matrix.stored_bytes for matrix in imported) * 8 / weights,
        entropy_bits=_mean([(matrix.entropy_bits, matrix.weights) for matrix in imported]),
    )


def _mean(values: Sequence[tuple[float, int]]) -> float:
    """The mean of values, each for a number of weights; 0 if there are none."""
    return math.fsum(value * weights for value, weights in values) / max(1, sum(weights for _, weights in values))
