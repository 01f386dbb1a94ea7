"""Code the matrices of a checkpoint: quantize, choose a code, encode, and meet the size that is asked for."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self, TypeVar

import numpy as np
from numpy.typing import NDArray

from entrollm.checkpoint.model_folder import Checkpoint
from entrollm.codec.blocks import blocks_for, choose_blocks
from entrollm.codec.choose import choose_code, choose_lossless_code
from entrollm.codec.encode import encode_symbols, row_chunks
from entrollm.codec.huffman import entropy_bits, huffman_bits
from entrollm.compress.methods import Methods
from entrollm.compress.options import CodingOptions
from entrollm.format import layout
from entrollm.format.blocks import block_count
from entrollm.format.flat import AnyCode
from entrollm.format.grid import GridKind
from entrollm.format.header import TensorTable
from entrollm.format.log_scales import LogScales, float_scales, zero_offsets
from entrollm.format.spec import Kind, TensorSpec
from entrollm.format.stored import StoredMatrix, store_matrix
from entrollm.matrix import CodedMatrix
from entrollm.quantize.method import CodeChooser, Float32, Quantized, Scales, out_of_range, too_large
from entrollm.threads import default_threads, start_pool

Result = TypeVar("Result")
_ERROR_DIGITS = 5
_TINY = float(np.finfo(np.float32).tiny)


@dataclass(frozen=True, eq=False)
class CodedResult:
    """A matrix that was coded.

    Attributes:
        matrix: what is stored.
        stored_bytes: what it adds to its file, its share of the header included, to within a few bytes.
        entropy_bits, huffman_bits: per weight, of the histogram of its symbols, and of the low bytes of lossless words.
    """

    matrix: StoredMatrix
    stored_bytes: int
    entropy_bits: float
    huffman_bits: float


class MatrixCoder:
    """Codes the matrices of one checkpoint on threads of its own.

    Args:
        checkpoint: the model.
        methods: the quantizers; they may expect the matrices in the order of the plan.
        options: decide between codes, and the number of threads.
    """

    def __init__(self, checkpoint: Checkpoint, methods: Methods, options: CodingOptions) -> None:
        self._checkpoint = checkpoint
        self._methods = methods
        self._prefer, self._processor = options.prefer, options.processor
        self._threads = options.threads or default_threads()
        self._executor = ThreadPoolExecutor(self._threads)

    def code(
        self, name: str, table: TensorTable, progress: Callable[[int], None] = lambda finished: None
    ) -> CodedResult:
        """Code one matrix, again and again until its methods accept the size.

        Args:
            name: a tensor of two axes with at least one weight.
            table: of the file that the matrix will be in.
            progress: called from the coder's threads with numbers of weights, which add up to those of the matrix.
        Raises:
            FormatError: a weight is not finite, or too large for a free step.
            EntroLLMError: no step meets the size.
        """
        result = self._code(name, table, progress)
        while not self._methods.settle(name, result.stored_bytes):
            result = self._code(name, table, lambda finished: None)
        return result

    def resume(self, matrix: CodedMatrix, stored_bytes: int) -> None:
        """Tell the methods of a matrix that an earlier run has coded, in place of coding it."""

        def weights() -> Float32:
            return matrix.dequantize(np.arange(matrix.spec.rows), start_pool(self._threads))

        self._methods.resume(matrix.name, stored_bytes, weights)

    def close(self) -> None:
        """End the threads."""
        self._executor.shutdown()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _code(self, name: str, table: TensorTable, progress: Callable[[int], None]) -> CodedResult:
        source = CheckpointRows(self._checkpoint, name, self._executor)
        quantized = self._methods.quantizer(name).quantize(source, self._chooser(source))
        _check_range(name, quantized)
        self._check_underflow(name, quantized.energy)
        counts = [int(c) for c in quantized.counts]
        code = self._code_of(quantized, source, counts)
        self._checkpoint.release(name)
        arrays = encode_symbols(quantized.symbols, code, source.blocks, source.chunks, self._executor, progress)
        arrays |= _scale_arrays(quantized)
        spec = TensorSpec(
            rows=source.shape[0],
            columns=source.shape[1],
            dtype=self._checkpoint.plain_dtype(name),
            grid_name=quantized.grid,
            code=code,
            blocks=blocks_for(code, *source.shape),
            kind=_kind(quantized),
            relative_error=relative_error(quantized.error, quantized.energy),
        )
        matrix = store_matrix(name, spec, arrays)
        low_bits = 0 if quantized.lossless is None else quantized.lossless.low_bits
        bits = entropy_bits(counts) + low_bits, huffman_bits(counts) + low_bits
        return CodedResult(matrix, table.stored_bytes(matrix), *bits)

    def _check_underflow(self, name: str, energy: float) -> None:
        """Check that the weights of a matrix in float64 do not vanish in float32."""
        info = self._checkpoint.tensors[name]
        if info.dtype == "F64" and energy <= info.weights * _TINY**2 and self._checkpoint.read(name).any():
            raise out_of_range(name, "its weights are float64, and too small for float32")

    def _code_of(self, quantized: Quantized, source: CheckpointRows, counts: list[int]) -> AnyCode:
        if quantized.lossless is None:
            return self._chooser(source, can_be_flat=quantized.groups is None)(counts)
        blocks = block_count(*source.shape, source.blocks)
        return choose_lossless_code(counts, blocks, quantized.lossless.low_bits, self._prefer, self._processor)

    def _chooser(self, source: CheckpointRows, *, can_be_flat: bool = True) -> CodeChooser:
        """Chooses the code of a matrix of this shape by the histogram of its symbols."""
        count = block_count(*source.shape, source.blocks)
        return functools.partial(
            choose_code, blocks=count, prefer=self._prefer, processor=self._processor, can_be_flat=can_be_flat
        )


class CheckpointRows:
    """A matrix of a checkpoint that quantizers read in chunks of whole row blocks; see `RowSource`."""

    def __init__(self, checkpoint: Checkpoint, name: str, executor: ThreadPoolExecutor) -> None:
        self.name = name
        rows, columns = checkpoint.tensors[name].shape
        self.shape = (rows, columns)
        self.blocks = choose_blocks(rows, columns)
        self.chunks = row_chunks(rows, columns, self.blocks)
        self._checkpoint = checkpoint
        self._executor = executor

    def read(self, begin: int, end: int) -> NDArray[Any]:
        """Rows [begin, end) in their own type if quantizers take it, else in float32."""
        return self._checkpoint.read_weights(self.name, begin, end)

    def map(self, work: Callable[[tuple[int, int]], Result]) -> list[Result]:
        """The results of `work` for each chunk, computed on the threads."""
        return list(self._executor.map(work, self.chunks))


def relative_error(error: float, energy: float) -> float:
    """The root of the ratio of two sums of squares, rounded to a few digits, which take little room in a header."""
    return float(f"{math.sqrt(error / energy) if energy else 0.0:.{_ERROR_DIGITS}g}")


def _scale_arrays(quantized: Quantized) -> dict[str, NDArray[np.generic]]:
    """What is stored besides the symbols: arrays of scales, or low bytes. A scale of all rows goes into the spec."""
    if quantized.groups is not None:
        return {f".{name}": layout.deflate_array(array) for name, array in quantized.groups.arrays.items()}
    if quantized.lossless is not None:
        return {} if quantized.low is None else {layout.LOW: layout.padded_stream([quantized.low.reshape(-1)])}
    arrays: dict[str, NDArray[np.generic]] = {}
    if len(quantized.scale) > 1:
        arrays[layout.SCALE] = _stored(quantized.scale)
        if quantized.offset is not None:
            arrays[layout.OFFSET] = quantized.offset
    if quantized.column_scale is not None:
        arrays[layout.COLUMN_SCALE] = _stored(quantized.column_scale)
    return arrays


def _check_range(name: str, quantized: Quantized) -> None:
    """Check that the offsets that follow from a zero symbol are finite."""
    if quantized.groups is not None or quantized.zero is None:
        return
    if not np.isfinite(zero_offsets(float_scales(quantized.scale), quantized.zero)).all():
        raise too_large(name)


def _stored(scales: Scales) -> NDArray[Any]:
    return scales.codes if isinstance(scales, LogScales) else scales


def _kind(quantized: Quantized) -> Kind:
    if quantized.lossless is not None:
        return quantized.lossless
    return quantized.groups.form if quantized.groups is not None else _grid_kind(quantized)


def _grid_kind(quantized: Quantized) -> GridKind:
    # Offsets of rows are among the arrays that `_scale_arrays` makes.
    offset = quantized.offset if len(quantized.scale) == 1 else None
    scales = {"scale": quantized.scale, "column_scale": quantized.column_scale}
    return GridKind(
        scale=_common_scale(quantized.scale),
        offset=None if offset is None else float(offset[0]),
        zero=quantized.zero,
        stored={name: codes.per_octave for name, codes in scales.items() if isinstance(codes, LogScales)},
        trellis=quantized.trellis,
    )


def _common_scale(scale: Scales) -> float | None:
    """The scale of the whole matrix, or the base of the codes of its rows; None if rows have numbers of their own."""
    if isinstance(scale, LogScales):
        return scale.base
    return float(scale[0]) if len(scale) == 1 else None
