"""What every quantizer has in common: rows of weights go in, integers and their scales come out."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from entrollm.format.code import Code
from entrollm.format.group_scales import GroupScales
from entrollm.format.log_scales import LogScales, float_scales, zero_offsets

Float32 = NDArray[np.float32]
Result = TypeVar("Result")
Scales = NDArray[Any] | LogScales


class RowSource(Protocol):
    """A matrix that is read by rows, in chunks that threads work on side by side.

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
        """The results of `work` on every chunk, in order; it runs on several threads."""


CodeChooser = Callable[[Sequence[int]], Code]


@dataclass(frozen=True)
class Quantized:
    """A matrix of integers: W[i, j] ~= (symbols[i, j] * scale[i] + offset[i]) * column_scale[j].

    Attributes:
        symbols: uint8, shape (rows, columns).
        counts: int64, shape (256,), how often each symbol occurs.
        grid: what the scales are, for people.
        scale: float32, bfloat16 or codes, shape (1,) or (rows,); codes are of all rows of several.
        offset: float32, the shape of scale; None for none.
        zero: where weight 0 is on the grid, between symbols perhaps, in place of an offset.
        column_scale: float32, bfloat16 or codes, shape (columns,), of base 1; None for none.
        error, energy: summed squares of the quantization error and of the weights.
        groups: in place of all other scales, those of groups of columns; None for none.
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

    def weights(self) -> Float32:
        """What a matrix on a signed grid has become: float32, shape (rows, columns), the numbers that readers find."""
        assert self.zero is not None
        scale = float_scales(self.scale)
        values = self.symbols.astype(np.float32)
        values *= scale[:, np.newaxis]
        values += zero_offsets(scale, self.zero)[:, np.newaxis]
        if self.column_scale is not None:
            values *= float_scales(self.column_scale)
        return values


class Quantizer(Protocol):
    """A method with its options set."""

    def quantize(self, source: RowSource, choose: CodeChooser) -> Quantized:
        """Quantize a matrix.

        Args:
            source: the matrix.
            choose: the code that a histogram of symbols would be stored with, for methods that round by its lengths.
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
        """The result of `work` on the one chunk."""
        return [work(chunk) for chunk in self.chunks]


def sum_counts(histograms: Iterable[NDArray[np.int64]]) -> NDArray[np.int64]:
    """Add up histograms of 256 entries."""
    total: NDArray[np.int64] = np.sum(list(histograms), axis=0, dtype=np.int64)
    return total
