"""The interface of quantizers: they read rows of weights and return integers and their scales."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from entrollm.arrays import Array
from entrollm.codec.trellis import half_steps
from entrollm.errors import FormatError, Message, Option
from entrollm.format.flat import AnyCode
from entrollm.format.group_scales import GroupScales
from entrollm.format.log_scales import LogScales, float_scales, zero_offsets
from entrollm.format.lossless import LosslessKind

Float32 = NDArray[np.float32]
Result = TypeVar("Result")
Scales = NDArray[Any] | LogScales


class RowSource(Protocol):
    """A matrix that is read by rows, in chunks that threads process side by side.

    Attributes:
        name: the tensor, for errors.
        shape: (rows, columns), each at least 1.
        chunks: ranges of rows that cover the matrix, in order.
    """

    @property
    def name(self) -> str: ...

    @property
    def shape(self) -> tuple[int, int]: ...

    @property
    def chunks(self) -> Sequence[tuple[int, int]]: ...

    def read(self, begin: int, end: int) -> NDArray[Any]:
        """Rows [begin, end) in float32, bfloat16 or float16."""

    def map(self, work: Callable[[tuple[int, int]], Result]) -> list[Result]:
        """The results of `work` for each chunk, in order; `work` runs on several threads."""


CodeChooser = Callable[[Sequence[int]], AnyCode]
"""Returns the code with which symbols of a histogram of 256 entries would be stored."""


@dataclass(frozen=True)
class Quantized:
    """A matrix of integers: W[i, j] ~= (symbols[i, j] * scale[i] + offset[i]) * column_scale[j].

    With a trellis, half steps are in the place of the symbols; see `codec.trellis`.

    Attributes:
        symbols: uint8, shape (rows, columns).
        counts: int64, shape (256,), how often each symbol occurs.
        grid: how the scales were chosen, human-readable.
        scale: float32, bfloat16 or codes, shape (1,) or (rows,); codes only if there are several rows.
        offset: float32, the shape of scale; None if absent.
        zero: the symbol (or half steps) that stands for weight 0, possibly between two, in place of an offset; None if
            absent.
        column_scale: float32, bfloat16 or codes of base 1, shape (columns,); None if absent.
        error, energy: sums of squares of the quantization error and of the weights.
        groups: group scales, which replace all other scales; None if absent.
        lossless: what the symbols are of lossless words, which replaces all scales; None if absent.
        low: uint8, shape (rows, columns), the bytes of lossless words that are not coded; None if absent.
        dense: what `weights` gives, up to float32 rounding, on a GPU that quantized; None elsewhere.
        trellis: whether the symbols choose between two grids.
    """

    symbols: NDArray[np.uint8]
    counts: NDArray[np.int64]
    grid: str
    scale: Scales
    error: float
    energy: float
    offset: Float32 | None = None
    zero: float | None = None
    column_scale: Scales | None = None
    groups: GroupScales | None = None
    lossless: LosslessKind | None = None
    low: NDArray[np.uint8] | None = None
    dense: Array | None = None
    trellis: bool = False

    def in_half_steps(self) -> Quantized:
        """The same with a trellis, for symbols of one whose scales are still those of steps."""
        assert self.zero is not None
        halved = replace(self.scale, base=self.scale.base / 2) if isinstance(self.scale, LogScales) else self.scale / 2
        return replace(self, scale=halved, zero=2 * self.zero, trellis=True)

    def weights(self) -> Float32:
        """The dequantized matrix, exactly as readers decode it; needs a `zero`. float32, shape (rows, columns)."""
        assert self.zero is not None
        scale = float_scales(self.scale)
        values = (half_steps(self.symbols) if self.trellis else self.symbols).astype(np.float32)
        values *= scale[:, np.newaxis]
        values += zero_offsets(scale, self.zero)[:, np.newaxis]
        if self.column_scale is not None:
            values *= float_scales(self.column_scale)
        return values


class Quantizer(Protocol):
    """A method of quantization with its options."""

    def quantize(self, source: RowSource, choose: CodeChooser) -> Quantized:
        """Quantize a matrix.

        Args:
            source: the matrix.
            choose: chooses codes, for methods that round by code length.
        Raises:
            FormatError: a weight is not finite.
        """


class ArraySource:
    """A matrix in memory, as one chunk."""

    def __init__(self, name: str, weights: NDArray[Any]) -> None:
        self.name = name
        self.shape = (weights.shape[0], weights.shape[1])
        self.chunks = ((0, len(weights)),)
        self._weights = weights

    def read(self, begin: int, end: int) -> NDArray[Any]:
        """Rows [begin, end)."""
        return self._weights[begin:end]

    def map(self, work: Callable[[tuple[int, int]], Result]) -> list[Result]:
        """The result of `work` for the one chunk."""
        return [work(chunk) for chunk in self.chunks]


# Sums of squares in float32 below this may lack those that underflowed.
_SMALLEST_SUM = 1e-28


def sum_of_squares(values: Float32) -> float:
    """The sum of squares of weights or errors: quickly in float32 where it holds them, else in float64.

    Args:
        values: float32, any shape.
    Returns:
        infinite if a value is.
    """
    flat = values.reshape(-1)
    with np.errstate(over="ignore", under="ignore"):
        total = float(np.dot(flat, flat))
    if _SMALLEST_SUM < total < math.inf:
        return total
    return float(np.square(flat, dtype=np.float64).sum())


def out_of_range(name: str, what: str) -> FormatError:
    """The error for a matrix whose weights are at an end of float32's range.

    Args:
        name: the tensor.
        what: what is wrong with it, such as "its largest weights are too near ...".
    """
    return FormatError(f"{name}: {what}", hint=Message("leave it in its type with {}", Option("keep", [name])))


def too_large(name: str) -> FormatError:
    """The error for a matrix whose free steps, or what they make of its weights, exceed float32."""
    message = "{}: its largest weights are too near the end of float32's range for {} and {}"
    hint = Message("leave it at its type with {}, or use {}", Option("keep", [name]), Option("bits", 8))
    return FormatError(Message(message, name, Option("bpw"), Option("size")), hint=hint)


def sum_counts(histograms: Iterable[NDArray[np.int64]]) -> NDArray[np.int64]:
    """Add up histograms of 256 entries."""
    total: NDArray[np.int64] = np.sum(list(histograms), axis=0, dtype=np.int64)
    return total
