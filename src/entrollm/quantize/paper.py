"""The grids of the EntroLLM paper (arXiv 2505.02380, section III): mixed symmetric and asymmetric rounding.

Weights of one sign are rounded as q = round(W / scale), weights of both signs as q = round((W - offset) / scale) with
their minimum as the offset. Symbols are unsigned, and W ~= q * scale + offset.
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from entrollm import _core
from entrollm.errors import FormatError
from entrollm.quantize.method import CodeChooser, Quantized, RowSource, out_of_range, sum_counts, sum_of_squares

Float32 = NDArray[np.float32]
Scheme = Literal["symmetric", "asymmetric"]
Granularity = Literal["tensor", "row"]

MIN_BITS = 2
MAX_BITS = 8

# 256 KB of float32: a block and its result stay in the L2 cache during the five passes over them.
_BLOCK_ELEMENTS = 1 << 16
# 256 KB of float32, which stay in the L2 cache while the error is added up.
_ERROR_WEIGHTS = 1 << 16
_FLOAT32_MAX = float(np.finfo(np.float32).max)


@dataclass(frozen=True)
class Range:
    """The smallest and the largest weight of each row: float32, shape (rows,), 0 for rows without weights."""

    minimum: Float32
    maximum: Float32


@dataclass(frozen=True)
class Grid:
    """A uniform grid of 2**bits symbols, for a whole tensor or one for each row.

    Attributes:
        scheme: 'symmetric' if no row needs an offset.
        bits: MIN_BITS to MAX_BITS.
        scale: float32, shape (1,) or (rows,); never 0, and negative if all weights are negative.
        offset: float32, the shape of scale, 0 for rows whose weights have one sign; None if symmetric.
    """

    scheme: Scheme
    bits: int
    scale: Float32
    offset: Float32 | None

    @property
    def granularity(self) -> Granularity:
        """'tensor' for one scale; a tensor of one row has one either way."""
        return "tensor" if len(self.scale) == 1 else "row"

    def dequantize(self, symbols: NDArray[np.uint8], first_row: int = 0) -> Float32:
        """Compute q * scale + offset in float32, rounding after the product and after the sum.

        Args:
            symbols: uint8, shape (r, columns): the rows from first_row on.
            first_row: the row of the tensor that symbols[0] is.
        Returns:
            float32, shape (r, columns).
        """
        values = symbols.astype(np.float32)
        values *= _rows_of(self.scale, first_row, len(symbols))
        if self.offset is not None:
            values += _rows_of(self.offset, first_row, len(symbols))
        return values


@dataclass(frozen=True, slots=True)
class PaperQuantizer:
    """The paper's method: the grid spans the range of the weights, and every weight is rounded to the nearest integer.

    Attributes:
        bits: width of the grid, MIN_BITS to MAX_BITS.
        granularity: one grid for the tensor, or one for each row.
    """

    bits: int
    granularity: Granularity = "tensor"

    def quantize(self, source: RowSource, choose: CodeChooser) -> Quantized:
        """Quantize a matrix; the code does not matter.

        Raises:
            FormatError: a weight is not finite.
        """

        def measure(chunk: tuple[int, int]) -> Range:
            return measure_range([source.read(*chunk)], source.name)

        ranges = source.map(measure)
        whole = Range(np.concatenate([r.minimum for r in ranges]), np.concatenate([r.maximum for r in ranges]))
        grid = make_grid(whole, self.bits, self.granularity)
        symbols = np.empty(source.shape, np.uint8)

        def quantize(chunk: tuple[int, int]) -> tuple[NDArray[np.int64], float, float]:
            begin, end = chunk
            weights = source.read(begin, end)
            symbols[begin:end] = quantize_rows(weights, grid, begin)
            error, energy = _squares(weights, symbols[begin:end], grid, begin)
            return _core.histogram(symbols[begin:end]), error, energy

        histograms, errors, energies = zip(*source.map(quantize), strict=True)
        return Quantized(
            symbols=symbols,
            counts=sum_counts(histograms),
            grid=f"paper-{grid.scheme}-{self.bits}-{grid.granularity}",
            scale=grid.scale,
            error=math.fsum(errors),
            energy=math.fsum(energies),
            offset=grid.offset,
        )


def measure_range(chunks: Iterable[NDArray[Any]], name: str) -> Range:
    """Find the range of every row of a tensor that is given in chunks of rows.

    Args:
        chunks: float32, bfloat16 or float16, shapes (r, columns), in order of rows.
        name: the tensor, for errors.
    Raises:
        FormatError: a weight is NaN or infinite, or the weights span more than float32 can hold.
    """
    minima: list[Float32] = []
    maxima: list[Float32] = []
    first_row = 0
    for chunk in chunks:
        for row, block in _float32_blocks(chunk):
            with np.errstate(invalid="ignore"):
                minima.append(block.min(axis=1) if block.size else np.zeros(len(block), np.float32))
                maxima.append(block.max(axis=1) if block.size else np.zeros(len(block), np.float32))
            # A NaN anywhere makes the minimum NaN, so the weights need no second pass.
            if not (np.isfinite(minima[-1]).all() and np.isfinite(maxima[-1]).all()):
                _refuse_not_finite(block, name, first_row + row)
        first_row += len(chunk)
    if not minima:
        return Range(np.zeros(0, np.float32), np.zeros(0, np.float32))
    result = Range(np.concatenate(minima), np.concatenate(maxima))
    smallest, largest = float(result.minimum.min()), float(result.maximum.max())
    if largest - smallest > _FLOAT32_MAX:
        raise out_of_range(name, f"its weights span {smallest} to {largest}, which is wider than float32")
    return result


def make_grid(value_range: Range, bits: int, granularity: Granularity = "tensor") -> Grid:
    """Choose scheme, scale and offset so that the grid spans the range.

    A row (or tensor) that is constant is exact: its scale is the constant and its symbol 1, or symbol 0 if it is 0.

    Raises:
        ValueError: bits is outside [MIN_BITS, MAX_BITS].
    """
    if not MIN_BITS <= bits <= MAX_BITS:
        raise ValueError(f"bits must be {MIN_BITS} to {MAX_BITS}, found {bits}")
    minimum, maximum = value_range.minimum.astype(np.float64), value_range.maximum.astype(np.float64)
    if granularity == "tensor":
        minimum = np.min(minimum, keepdims=True, initial=0.0 if len(minimum) == 0 else np.inf)
        maximum = np.max(maximum, keepdims=True, initial=0.0 if len(maximum) == 0 else -np.inf)
    # Signs are compared. The paper multiplies, which would underflow to 0 for tiny weights of both signs.
    two_signed = (minimum < 0) & (maximum > 0)
    extreme = np.where(maximum > 0, maximum, minimum)
    span = np.where(two_signed, maximum - minimum, extreme)
    scale = _divide_span(span, (1 << bits) - 1)
    constant = minimum == maximum
    scale[constant] = np.where(minimum == 0, 1.0, minimum)[constant].astype(np.float32)
    if not two_signed.any():
        return Grid("symmetric", bits, scale, None)
    return Grid("asymmetric", bits, scale, np.where(two_signed, minimum, 0.0).astype(np.float32))


def quantize_rows(weights: NDArray[Any], grid: Grid, first_row: int = 0) -> NDArray[np.uint8]:
    """Round rows of a tensor to the symbols of its grid.

    Args:
        weights: float32, bfloat16 or float16, shape (r, columns), in the range that the grid was made from.
        grid: the tensor's grid.
        first_row: the row of the tensor that weights[0] is.
    Returns:
        uint8, shape (r, columns), values below 2**grid.bits.
    """
    symbols = np.empty(weights.shape, np.uint8)
    if weights.size == 0:
        return symbols
    top = np.float32((1 << grid.bits) - 1)
    scratch = np.empty(min(weights.size, max(_BLOCK_ELEMENTS, weights.shape[1])), np.float32)
    for row, block in _float32_blocks(weights):
        rows = len(block)
        result = scratch[: block.size].reshape(block.shape)
        if grid.offset is None:
            np.divide(block, _rows_of(grid.scale, first_row + row, rows), out=result)
        else:
            np.subtract(block, _rows_of(grid.offset, first_row + row, rows), out=result)
            np.divide(result, _rows_of(grid.scale, first_row + row, rows), out=result)
        np.rint(result, out=result)
        np.clip(result, np.float32(0), top, out=result)
        np.copyto(symbols[row : row + rows], result, casting="unsafe")
    return symbols


def _float32_blocks(weights: NDArray[Any]) -> Iterator[tuple[int, Float32]]:
    """Yield (first row, rows as float32) in blocks that fit the cache; a block is valid until the next one."""
    rows, columns = weights.shape
    step = max(1, _BLOCK_ELEMENTS // max(1, columns))
    scratch = None if weights.dtype == np.float32 else np.empty((min(step, rows), columns), np.float32)
    for row in range(0, rows, step):
        block = weights[row : row + step]
        if scratch is None:
            yield row, block
        else:
            np.copyto(scratch[: len(block)], block, casting="same_kind")
            yield row, scratch[: len(block)]


def _rows_of(values: Float32, first_row: int, rows: int) -> Float32:
    """The values of some rows as a column, or the one value of the tensor."""
    return values if len(values) == 1 else values[first_row : first_row + rows, np.newaxis]


def _divide_span(span: NDArray[np.float64], top: int) -> Float32:
    """Compute span / top as float32, corrected at both ends of float32.

    A denormal scale may be rounded to much less than span / top, which would clip the largest weights, so it is rounded
    up. Near the largest float32, top * scale may become infinite, so the scale is rounded down.
    """
    exact = span / top
    scale = exact.astype(np.float32)
    short = np.abs(scale.astype(np.float64)) < np.abs(exact) * (1 - 2.0**-20)
    scale = np.where(short, np.nextafter(scale, np.copysign(np.float32(np.inf), span.astype(np.float32))), scale)
    beyond = np.abs(scale.astype(np.float64)) * top > _FLOAT32_MAX
    return np.where(beyond, np.nextafter(scale, np.float32(0)), scale).astype(np.float32)


def _squares(weights: NDArray[Any], symbols: NDArray[np.uint8], grid: Grid, first_row: int) -> tuple[float, float]:
    """Sums of squares of the quantization error and of the weights."""
    error = energy = 0.0
    step = max(1, _ERROR_WEIGHTS // weights.shape[1])
    for begin in range(0, len(weights), step):
        original = weights[begin : begin + step].astype(np.float32)
        difference = grid.dequantize(symbols[begin : begin + step], first_row + begin)
        difference -= original
        error += sum_of_squares(difference)
        energy += sum_of_squares(original)
    return error, energy


def _refuse_not_finite(block: Float32, name: str, first_row: int) -> None:
    row, column = (int(index) for index in np.argwhere(~np.isfinite(block))[0])
    raise FormatError(
        f"tensor {name!r} has {block[row, column]} at [{first_row + row}, {column}]; weights must be finite"
    )
