"""Compress one matrix: measure, quantize, choose a code, encode; chunks of rows side by side on all cores."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from entrollm import _core
from entrollm.checkpoint import Checkpoint
from entrollm.codec.blocks import block_count, choose_blocks
from entrollm.codec.choose import Prefer, choose_code
from entrollm.codec.cost import Target
from entrollm.codec.huffman import entropy_bits, huffman_bits
from entrollm.container import layout
from entrollm.quantize.paper import Granularity, Grid, Range, make_grid, measure_range, quantize_rows
from entrollm.specs import Blocks, Code, TensorSpec

# Enough weights for a thread to be worth waking, few enough to keep temporaries small.
_CHUNK_WEIGHTS = 1 << 18
# 256 KB of float32 stays in L2 while the error is summed.
_ERROR_WEIGHTS = 1 << 16


@dataclass(frozen=True)
class CompressedTensor:
    """A matrix ready to be stored, and what its integers cost.

    Attributes:
        spec: its spec, checksum not yet filled in.
        arrays: stored arrays by suffix.
        entropy_bits, huffman_bits: per weight, of the symbols' histogram.
    """

    spec: TensorSpec
    arrays: dict[str, NDArray[np.generic]]
    entropy_bits: float
    huffman_bits: float


class TensorCompressor:
    """Compresses the matrices of one checkpoint on a thread pool."""

    def __init__(
        self, checkpoint: Checkpoint, executor: ThreadPoolExecutor, prefer: Prefer, target: Target = "x86"
    ) -> None:
        self._checkpoint = checkpoint
        self._executor = executor
        self._prefer = prefer
        self._target = target

    def compress(
        self, name: str, bits: int, granularity: Granularity, progress: Callable[[int], None]
    ) -> CompressedTensor:
        """Compress one matrix.

        Args:
            name: a two-dimensional tensor with at least one weight.
            bits: width of its grid.
            granularity: one grid for it or one per row.
            progress: called with numbers of weights as they are finished; they sum to the tensor's weights.
        Raises:
            FormatError: a weight is not finite.
        """
        info = self._checkpoint.tensors[name]
        rows, columns = info.shape
        blocks = choose_blocks(rows, columns)
        chunks = list(_row_chunks(rows, columns, blocks))
        grid = self._grid(name, chunks, bits, granularity)
        symbols = np.empty((rows, columns), np.uint8)

        def quantize(chunk: tuple[int, int]) -> tuple[NDArray[np.int64], float, float]:
            begin, end = chunk
            weights = self._read(name, begin, end)
            symbols[begin:end] = quantize_rows(weights, grid, begin)
            error, energy = _squares(weights, symbols[begin:end], grid, begin)
            return _core.histogram(symbols[begin:end]), error, energy

        quantized = list(self._executor.map(quantize, chunks))
        counts = [int(c) for c in np.sum([histogram for histogram, _, _ in quantized], axis=0)]
        error, energy = (math.fsum(values) for values in list(zip(*quantized, strict=True))[1:])
        code = choose_code(counts, block_count(rows, columns, blocks), self._prefer, self._target)
        self._checkpoint.release(name)
        arrays = self._encode(symbols, code, blocks, chunks, progress)
        per_row = grid.granularity == "row"
        if per_row:
            arrays[layout.SCALE] = grid.scale
            if grid.offset is not None:
                arrays[layout.OFFSET] = grid.offset
        spec = TensorSpec(
            rows=rows,
            columns=columns,
            dtype=stored_dtype(self._checkpoint, name),
            grid=f"paper-{grid.scheme}-{bits}-{grid.granularity}",
            code=code,
            blocks=blocks,
            scale=None if per_row else float(grid.scale[0]),
            offset=None if per_row or grid.offset is None else float(grid.offset[0]),
            relative_error=math.sqrt(error / energy) if energy else 0.0,
            checksum=0,
        )
        return CompressedTensor(spec, arrays, entropy_bits(counts), huffman_bits(counts))

    def _read(self, name: str, begin: int, end: int) -> NDArray[np.generic]:
        """Rows in a type that the quantizer takes."""
        if self._checkpoint.tensors[name].dtype in ("BF16", "F16", "F32"):
            return self._checkpoint.read(name, begin, end)
        return self._checkpoint.read_float32(name, begin, end)

    def _grid(self, name: str, chunks: list[tuple[int, int]], bits: int, granularity: Granularity) -> Grid:
        def measure(chunk: tuple[int, int]) -> Range:
            return measure_range([self._read(name, *chunk)], name)

        ranges = list(self._executor.map(measure, chunks))
        whole = Range(np.concatenate([r.minimum for r in ranges]), np.concatenate([r.maximum for r in ranges]))
        return make_grid(whole, bits, granularity)

    def _encode(
        self,
        symbols: NDArray[np.uint8],
        code: Code,
        blocks: Blocks,
        chunks: list[tuple[int, int]],
        progress: Callable[[int], None],
    ) -> dict[str, NDArray[np.generic]]:
        program = code.program()

        def encode(chunk: tuple[int, int]) -> tuple[NDArray[np.uint8], NDArray[np.uint8], NDArray[np.uint16]]:
            rows = symbols[chunk[0] : chunk[1]]
            encoded = _core.encode(program, code.low_bits, rows, blocks.rows, blocks.columns)
            progress(rows.size)
            return encoded

        encoded = list(self._executor.map(encode, chunks))
        sparse = layout.padded_stream([sparse for _, sparse, _ in encoded])
        arrays: dict[str, NDArray[np.generic]] = {
            layout.DENSE: layout.padded_stream([dense for dense, _, _ in encoded]),
            layout.SPARSE: sparse,
        }
        if sparse.size:
            arrays[layout.SPARSE_SIZES] = np.concatenate([sizes for _, _, sizes in encoded])
        return arrays


def stored_dtype(checkpoint: Checkpoint, name: str) -> str:
    """The type that a tensor has outside the code: its own, but bf16 for fp8 with scales, which belong together."""
    return "BF16" if checkpoint.has_scales(name) else checkpoint.tensors[name].dtype


def _row_chunks(rows: int, columns: int, blocks: Blocks) -> Iterator[tuple[int, int]]:
    """Ranges of whole row groups with about _CHUNK_WEIGHTS weights."""
    groups = max(1, _CHUNK_WEIGHTS // (blocks.rows * columns))
    step = groups * blocks.rows
    for begin in range(0, rows, step):
        yield begin, min(rows, begin + step)


def _squares(
    weights: NDArray[np.generic], symbols: NDArray[np.uint8], grid: Grid, first_row: int
) -> tuple[float, float]:
    """Summed squares of the quantization error and of the weights."""
    error = energy = 0.0
    step = max(1, _ERROR_WEIGHTS // weights.shape[1])
    for begin in range(0, len(weights), step):
        original = weights[begin : begin + step].astype(np.float32).ravel()
        difference = grid.dequantize(symbols[begin : begin + step], first_row + begin).ravel()
        difference -= original
        error += float(np.dot(difference, difference))
        energy += float(np.dot(original, original))
    return error, energy
