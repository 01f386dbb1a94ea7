"""Describe a compressed folder tensor by tensor, measured from its bytes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from entrollm import _core
from entrollm.checkpoint.names import natural_key
from entrollm.codec.huffman import entropy_bits, huffman_bits
from entrollm.format.code import Field, Leaf, Node, Split
from entrollm.format.flat import AnyCode, FlatCode
from entrollm.format.lossless import LosslessKind
from entrollm.format.reader import CompressedModel
from entrollm.format.spec import TensorSpec
from entrollm.matrix import CodedMatrix, code_of

_CHUNK_WEIGHTS = 1 << 22


@dataclass(frozen=True, slots=True)
class TensorReport:
    """One coded matrix; bits are per weight.

    Attributes:
        name, shape, grid: what it is and how it was quantized.
        code: the form of its code, as `describe_code` states it.
        symbols: the number of distinct symbols that occur.
        entropy_bits, huffman_bits: of the histogram of its symbols, and of the low bytes of lossless words.
        file_bits: stored bits, without a share of the file's header.
        relative_error: RMS quantization error over the RMS of the original weights.
    """

    name: str
    shape: tuple[int, int]
    grid: str
    code: str
    symbols: int
    entropy_bits: float
    huffman_bits: float
    file_bits: float
    relative_error: float

    @property
    def weights(self) -> int:
        """Number of weights."""
        return self.shape[0] * self.shape[1]


@dataclass(frozen=True, slots=True)
class ModelReport:
    """A compressed folder; means are over coded weights.

    Attributes:
        tensors: the coded matrices.
        kept: names of the plain tensors, which have kept_weights weights in kept_bytes bytes.
        file_bytes: size of all weight files, headers included.
    """

    tensors: tuple[TensorReport, ...]
    kept: tuple[str, ...]
    kept_weights: int
    kept_bytes: int
    file_bytes: int

    @property
    def coded_weights(self) -> int:
        """Weights in coded matrices."""
        return sum(tensor.weights for tensor in self.tensors)

    @property
    def weights(self) -> int:
        """All weights of the model."""
        return self.coded_weights + self.kept_weights

    @property
    def entropy_bits(self) -> float:
        """Mean entropy per coded weight."""
        return sum(t.entropy_bits * t.weights for t in self.tensors) / max(1, self.coded_weights)

    @property
    def huffman_bits(self) -> float:
        """Mean Huffman optimum per coded weight."""
        return sum(t.huffman_bits * t.weights for t in self.tensors) / max(1, self.coded_weights)

    @property
    def coded_bits(self) -> float:
        """Stored bits per coded weight: the files without the plain tensors."""
        return (self.file_bytes - self.kept_bytes) * 8 / self.coded_weights if self.tensors else 0.0

    @property
    def file_bits(self) -> float:
        """Stored bits per weight of the whole model, everything included."""
        return self.file_bytes * 8 / max(1, self.weights)

    def to_json(self) -> dict[str, Any]:
        """All totals and tensors."""
        totals = ("weights", "coded_weights", "kept_weights", "kept_bytes", "file_bytes")
        bits = ("file_bits", "coded_bits", "entropy_bits", "huffman_bits")
        return {
            **{key: getattr(self, key) for key in (*totals, *bits)},
            "tensors": [asdict(tensor) for tensor in self.tensors],
            "kept": list(self.kept),
        }


def describe(
    model: CompressedModel, pool: _core.ThreadPool, on_progress: Callable[[float, float], None] | None = None
) -> ModelReport:
    """Decode every matrix once and report on its symbols and its bytes.

    Args:
        model: the folder.
        pool: threads to decode on.
        on_progress: called with the weights that are done and all weights.
    Raises:
        FormatError: a matrix is malformed or does not decode.
    """
    total = sum(spec.rows * spec.columns for spec in model.specs.values())
    done = 0
    reports = []
    for name in model.specs:
        reports.append(_describe_matrix(code_of(model, name), model.specs[name], pool))
        model.release(name)
        done += reports[-1].weights
        if on_progress is not None:
            on_progress(done, total)
    kept = [model.array(name) for name in model.plain]
    return ModelReport(
        tensors=tuple(sorted(reports, key=lambda report: natural_key(report.name))),
        kept=tuple(sorted(model.plain, key=natural_key)),
        kept_weights=sum(array.size for array in kept),
        kept_bytes=sum(array.nbytes for array in kept),
        file_bytes=model.file_bytes(),
    )


def symbol_chunks(matrix: CodedMatrix, pool: _core.ThreadPool) -> Iterator[tuple[int, NDArray[np.uint8]]]:
    """Decode a matrix in runs of whole row blocks; yields (first row, symbols)."""
    spec = matrix.spec
    step = max(1, _CHUNK_WEIGHTS // (spec.columns * spec.blocks.rows)) * spec.blocks.rows
    for begin in range(0, spec.rows, step):
        yield begin, matrix.symbols(begin, min(spec.rows, begin + step), pool)


def _describe_matrix(matrix: CodedMatrix, spec: TensorSpec, pool: _core.ThreadPool) -> TensorReport:
    counts = np.zeros(256, np.int64)
    for _, symbols in symbol_chunks(matrix, pool):
        counts += _core.histogram(symbols)
    histogram = [int(c) for c in counts]
    low_bits = spec.kind.low_bits if isinstance(spec.kind, LosslessKind) else 0
    return TensorReport(
        name=matrix.name,
        shape=(spec.rows, spec.columns),
        grid=spec.grid_name + (" + trellis" if spec.has_trellis else ""),
        code=describe_code(spec.code, matrix.flat_rows),
        symbols=sum(1 for c in histogram if c),
        entropy_bits=entropy_bits(histogram) + low_bits,
        huffman_bits=huffman_bits(histogram) + low_bits,
        file_bits=matrix.stored_bytes * 8 / (spec.rows * spec.columns),
        relative_error=spec.relative_error,
    )


def describe_code(code: AnyCode, flat_rows: Mapping[int, int]) -> str:
    """A code in words: a cascade, its field widths and raw bits, a tree and its nodes, or the widths of flat fields.

    Args:
        code: the code.
        flat_rows: how many rows have flat fields of each width, by bits; used with a flat code.
    """
    if isinstance(code, FlatCode):
        return "flat " + " + ".join(map(str, sorted(flat_rows)))
    low = f" + {code.low_bits} raw" if code.low_bits else ""
    if isinstance(code.tree, Leaf):
        return "constant" + low
    widths = []
    node: Node | None = code.tree
    while isinstance(node, Field):
        widths.append(node.bits)
        node = node.escape
    if node is None:
        return "cascade " + "-".join(map(str, widths)) + low
    return f"tree of {_count_nodes(code.tree)}" + low


def _count_nodes(node: Node) -> int:
    if isinstance(node, Split):
        return 1 + _count_nodes(node.left) + _count_nodes(node.right)
    return 1 + (_count_nodes(node.escape) if isinstance(node, Field) and node.escape is not None else 0)
