"""Compress one matrix: measure, quantize, choose a code, encode; chunks of rows side by side on all cores."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from entrollm import _core
from entrollm.checkpoint.model_folder import Checkpoint
from entrollm.codec.blocks import choose_blocks
from entrollm.codec.choose import Prefer, choose_code
from entrollm.codec.cost import Processor
from entrollm.codec.huffman import entropy_bits, huffman_bits
from entrollm.errors import FormatError
from entrollm.format import layout
from entrollm.format.blocks import Blocks, block_count
from entrollm.format.code import Code
from entrollm.format.entry import pack
from entrollm.format.grid import GridKind
from entrollm.format.log_scales import LogScales, float_scales, zero_offsets
from entrollm.format.spec import TensorSpec
from entrollm.quantize.method import CodeChooser, Quantized, Quantizer, Scales

Result = TypeVar("Result")

# Enough weights for a thread to be worth waking, few enough to keep temporaries small.
_CHUNK_WEIGHTS = 1 << 18
_ERROR_DIGITS = 5


@dataclass(frozen=True)
class CompressedTensor:
    """A matrix ready to be stored, and what its integers cost.

    Attributes:
        spec: its spec, checksum not yet filled in.
        arrays: stored arrays by suffix, packed.
        entropy_bits, huffman_bits: per weight, of the symbols' histogram.
    """

    spec: TensorSpec
    arrays: dict[str, NDArray[np.generic]]
    entropy_bits: float
    huffman_bits: float


class CheckpointRows:
    """A matrix of a checkpoint, in chunks of whole row groups, for quantizers to read; see `RowSource`."""

    def __init__(self, checkpoint: Checkpoint, name: str, executor: ThreadPoolExecutor) -> None:
        self.name = name
        rows, columns = checkpoint.tensors[name].shape
        self.shape = (rows, columns)
        self.blocks = choose_blocks(rows, columns)
        self.chunks = row_chunks(rows, columns, self.blocks)
        self._checkpoint = checkpoint
        self._executor = executor
        self._direct = checkpoint.tensors[name].dtype in ("BF16", "F16", "F32")

    def read(self, begin: int, end: int) -> NDArray[Any]:
        """Rows [begin, end) in their own type where quantizers take it, else in float32."""
        if self._direct:
            return self._checkpoint.read(self.name, begin, end)
        return self._checkpoint.read_float32(self.name, begin, end)

    def map(self, work: Callable[[tuple[int, int]], Result]) -> list[Result]:
        """The results of `work` on every chunk, on the pool."""
        return list(self._executor.map(work, self.chunks))


class TensorCompressor:
    """Compresses the matrices of one checkpoint on a thread pool."""

    def __init__(
        self, checkpoint: Checkpoint, executor: ThreadPoolExecutor, prefer: Prefer, processor: Processor = "x86"
    ) -> None:
        self._checkpoint = checkpoint
        self._executor = executor
        self._prefer = prefer
        self._processor = processor

    def compress(self, name: str, quantizer: Quantizer, progress: Callable[[int], None]) -> CompressedTensor:
        """Compress one matrix.

        Args:
            name: a two-dimensional tensor with at least one weight.
            quantizer: how it becomes integers.
            progress: called with numbers of weights as they are finished; they sum to the tensor's weights.
        Raises:
            FormatError: a weight is not finite, or too large for a free step.
        """
        source = CheckpointRows(self._checkpoint, name, self._executor)
        rows, columns = source.shape
        blocks = source.blocks
        choose = self.chooser(source.shape)
        quantized = quantizer.quantize(source, choose)
        _check_range(name, quantized)
        counts = [int(c) for c in quantized.counts]
        code = choose(counts)
        self._checkpoint.release(name)
        arrays = encode_symbols(quantized.symbols, code, blocks, source.chunks, self._executor, progress)
        arrays |= _scale_arrays(quantized)
        spec = TensorSpec(
            rows=rows,
            columns=columns,
            dtype=stored_dtype(self._checkpoint, name),
            grid_name=quantized.grid,
            code=code,
            blocks=blocks,
            kind=quantized.groups.form if quantized.groups is not None else _grid_kind(quantized),
            relative_error=relative_error(quantized.error, quantized.energy),
        )
        spec, arrays = pack(spec, arrays)
        return CompressedTensor(spec, arrays, entropy_bits(counts), huffman_bits(counts))

    def chooser(self, shape: tuple[int, int]) -> CodeChooser:
        """The choice of a code for a matrix of this shape."""
        count = block_count(*shape, choose_blocks(*shape))
        return functools.partial(choose_code, blocks=count, prefer=self._prefer, processor=self._processor)


def encode_symbols(
    symbols: NDArray[np.uint8],
    code: Code,
    blocks: Blocks,
    chunks: Sequence[tuple[int, int]],
    executor: ThreadPoolExecutor,
    progress: Callable[[int], None],
) -> dict[str, NDArray[Any]]:
    """Encode a matrix of integers.

    Args:
        symbols: uint8, shape (rows, columns), all in the code.
        code, blocks: how they are stored.
        chunks: ranges of rows, each of whole row groups, that threads encode side by side.
        executor: the threads.
        progress: called with numbers of weights as they are finished.
    Returns:
        the streams as they are stored, by suffix; the sparse one may be empty.
    """
    program = code.program()

    def encode(chunk: tuple[int, int]) -> tuple[NDArray[np.uint8], NDArray[np.uint8], NDArray[np.uint16]]:
        rows = symbols[chunk[0] : chunk[1]]
        encoded = _core.encode(program, code.low_bits, rows, blocks.rows, blocks.columns)
        progress(rows.size)
        return encoded

    encoded = list(executor.map(encode, chunks))
    sparse = layout.padded_stream([sparse for _, sparse, _ in encoded])
    arrays: dict[str, NDArray[Any]] = {
        layout.DENSE: layout.padded_stream([dense for dense, _, _ in encoded]),
        layout.SPARSE: sparse,
    }
    if sparse.size:
        arrays[layout.SPARSE_SIZES] = np.concatenate([sizes for _, _, sizes in encoded])
    return arrays


def _scale_arrays(quantized: Quantized) -> dict[str, NDArray[np.generic]]:
    """The scales that need an entry; one scale or offset for the whole tensor goes into its spec."""
    if quantized.groups is not None:
        return {f".{name}": layout.pack_array(array) for name, array in quantized.groups.arrays.items()}
    arrays: dict[str, NDArray[np.generic]] = {}
    if len(quantized.scale) > 1:
        arrays[layout.SCALE] = _stored(quantized.scale)
        if quantized.offset is not None:
            arrays[layout.OFFSET] = quantized.offset
    if quantized.column_scale is not None:
        arrays[layout.COLUMN_SCALE] = _stored(quantized.column_scale)
    return arrays


def _check_range(name: str, quantized: Quantized) -> None:
    """Check that the offsets which readers find are finite."""
    if quantized.groups is not None or quantized.zero is None:
        return
    if not np.isfinite(zero_offsets(float_scales(quantized.scale), quantized.zero)).all():
        raise FormatError(
            f"{name}: its largest weights are too near the end of float32's range for --bpw and --fit; "
            "leave it at its type with --keep, or use --bits 8"
        )


def _stored(scales: Scales) -> NDArray[Any]:
    return scales.codes if isinstance(scales, LogScales) else scales


def _codes_per_octave(quantized: Quantized) -> dict[str, str | int]:
    named = {"scale": quantized.scale, "column_scale": quantized.column_scale}
    return {kind: scales.per_octave for kind, scales in named.items() if isinstance(scales, LogScales)}


def _grid_kind(quantized: Quantized) -> GridKind:
    # Offsets per row are among the arrays that `_scale_arrays` makes.
    offset = quantized.offset if len(quantized.scale) == 1 else None
    return GridKind(
        scale=_scale_of_all(quantized.scale),
        offset=None if offset is None else float(offset[0]),
        zero=quantized.zero,
        stored=_codes_per_octave(quantized),
    )


def _scale_of_all(scale: Scales) -> float | None:
    """The one scale of a matrix, or what the codes of its rows multiply; None where rows have numbers of their own."""
    if isinstance(scale, LogScales):
        return scale.base
    return float(scale[0]) if len(scale) == 1 else None


def relative_error(error: float, energy: float) -> float:
    """The root of the ratio of two sums of squares, to a few digits, which take little room in a header."""
    return float(f"{math.sqrt(error / energy) if energy else 0.0:.{_ERROR_DIGITS}g}")


def stored_dtype(checkpoint: Checkpoint, name: str) -> str:
    """The type that a tensor has outside the code: its own, but bf16 for fp8 with scales, which belong together."""
    return "BF16" if checkpoint.has_scales(name) else checkpoint.tensors[name].dtype


def row_chunks(rows: int, columns: int, blocks: Blocks) -> tuple[tuple[int, int], ...]:
    """Ranges of whole row groups with enough weights for a thread each."""
    groups = max(1, _CHUNK_WEIGHTS // (blocks.rows * columns))
    step = groups * blocks.rows
    return tuple((begin, min(rows, begin + step)) for begin in range(0, rows, step))
