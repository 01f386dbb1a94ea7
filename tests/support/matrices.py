"""Hypothesis strategies for codes, shapes and matrices of symbols, and what native runs do with them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from hypothesis import strategies as st
from numpy.typing import NDArray

from entrollm import _core
from entrollm.codec.blocks import choose_blocks
from entrollm.codec.reference import code_bits
from entrollm.format.blocks import Blocks, padded
from entrollm.format.code import Code, Field, Leaf, Node, Split
from entrollm.format.layout import padded_stream
from entrollm.format.log_scales import LogScales, float_scales
from entrollm.format.spec import MAX_BLOCK_WEIGHTS

WIDE = (384, 576, 960, 2048, 4096, 4097, 5000, 14336)
_DEEPEST = 4


@st.composite
def codes(draw: st.DrawFn) -> Code:
    """Any valid code: fields of 1 to 6 bits with and without escapes, raw fields, splits, a leaf, low bits."""
    low_bits = draw(st.integers(0, 6))
    allowed = np.arange(0, 256, 1 << low_bits)
    generator = np.random.default_rng(draw(st.integers(0, 2**32)))

    def take(count: int) -> tuple[int, ...]:
        if count <= len(allowed) and draw(st.booleans()):
            return tuple(int(s) for s in generator.permutation(allowed)[:count])
        return tuple(int(s) for s in generator.choice(allowed, count))  # with repetitions

    def node(depth: int) -> Node:
        deep = depth >= _DEEPEST - draw(st.integers(0, 2))
        kinds = ["field", "raw"] if deep else ["escape", "split", "escape", "split", "field", "raw"]
        kind = draw(st.sampled_from(["leaf", *kinds] if depth == 0 else kinds))
        if kind == "leaf":
            return Leaf(*take(1))
        if kind == "raw":
            return Field(8, ())
        if kind == "split":
            return Split(node(depth + 1), node(depth + 1))
        bits = draw(st.integers(1, 6))
        if kind == "escape":
            return Field(bits, take(2**bits - 1), node(depth + 1))
        return Field(bits, take(2**bits))

    return Code(node(0), low_bits)


def encodable(code: Code) -> NDArray[np.uint8]:
    """The symbols that a code can store, low bits included."""
    step = 1 << code.low_bits
    high = [s for s in range(0, 256, step) if code_bits(code.tree, s) is not None]
    return np.array([s + low for s in high for low in range(step)], np.uint8)


@st.composite
def shapes(draw: st.DrawFn, most: int) -> tuple[int, int]:
    """Rows and columns with at most about `most` weights, but any width at least once."""
    columns = draw(st.one_of(st.integers(1, 200), st.sampled_from(WIDE)))
    return draw(st.integers(1, max(1, min(40, most // columns)))), columns


@st.composite
def block_shapes(draw: st.DrawFn, rows: int, columns: int) -> Blocks:
    """The blocks that the encoder chooses, or any other that the format allows."""
    if draw(st.booleans()):
        return choose_blocks(rows, columns)
    width = 64 * draw(st.integers(1, min(padded(columns), 4096) // 64))
    return Blocks(draw(st.integers(1, MAX_BLOCK_WEIGHTS // width)), width)


@st.composite
def symbol_matrices(draw: st.DrawFn, code: Code, shape: tuple[int, int]) -> NDArray[np.uint8]:
    """Symbols of the code, from uniform to a single one."""
    generator = np.random.default_rng(draw(st.integers(0, 2**32)))
    alphabet = generator.permutation(encodable(code))
    skew = draw(st.sampled_from([0.0, 1.0, 3.0, 30.0]))
    weights = np.arange(1, len(alphabet) + 1) ** -skew
    return generator.choice(alphabet, shape, p=weights / weights.sum())


@dataclass(frozen=True)
class StoredMatrix:
    """The arguments of a native coded matrix, as they would come from a file."""

    program: bytes
    low_bits: int
    shape: tuple[int, int]
    blocks: tuple[int, int]
    dense: NDArray[np.uint8]
    sparse: NDArray[np.uint8]
    sizes: NDArray[np.uint16]
    scale: NDArray[np.float32]
    offset: NDArray[np.float32] | None = None
    column_scale: NDArray[np.float32] | None = None
    trellis: bool = False

    def open(self) -> _core.CodedMatrix:
        """The matrix on this process's kernels."""
        return _core.CodedMatrix(
            self.program,
            self.low_bits,
            _core.Geometry(*self.shape, *self.blocks),
            self.dense if self.dense.size else np.zeros(_core.SLACK_BYTES, np.uint8),
            self.sparse if self.sparse.size else np.zeros(_core.SLACK_BYTES, np.uint8),
            self.sizes,
            self.scale,
            self.offset,
            self.column_scale,
            self.trellis,
        )


def store(
    code: Code,
    symbols: NDArray[np.uint8],
    blocks: Blocks | None = None,
    scale: Sequence[float] = (1.0,),
    offset: Sequence[float] | None = None,
    column_scale: Sequence[float] | None = None,
    *,
    trellis: bool = False,
) -> StoredMatrix:
    """Encode with the native encoder."""
    rows, columns = symbols.shape
    blocks = blocks or choose_blocks(rows, columns)
    dense, sparse, sizes = _core.encode(code.program(), code.low_bits, symbols, blocks.rows, blocks.columns)
    return StoredMatrix(
        code.program(),
        code.low_bits,
        (rows, columns),
        (blocks.rows, blocks.columns),
        padded_stream([dense]),
        padded_stream([sparse]),
        sizes if sparse.size else np.zeros(0, np.uint16),
        np.array(scale, np.float32),
        None if offset is None else np.array(offset, np.float32),
        None if column_scale is None else np.array(column_scale, np.float32),
        trellis,
    )


def decode(stored: StoredMatrix, threads: int = 1) -> NDArray[np.uint8]:
    """All symbols of a matrix."""
    return stored.open().decode(0, stored.shape[0], _core.ThreadPool(threads))


def multiply(stored: StoredMatrix, x: NDArray[np.float32], threads: int = 1) -> NDArray[np.float32]:
    """The product with every row of x."""
    return stored.open().multiply(x, _core.ThreadPool(threads))


def multiply_groups(
    stored: StoredMatrix,
    x: NDArray[np.float32],
    size: int,
    scale: NDArray[np.float32],
    shift: NDArray[np.float32] | None,
    values: NDArray[np.float32] | None = None,
    threads: int = 1,
) -> NDArray[np.float32]:
    """The product with every row of x, of the weights that groups of columns scale; the flat form has the same."""
    arrays = {"group_scale": (scale.view(np.uint8), "F32")}
    if shift is not None:
        arrays["group_minimum"] = ((-shift).view(np.uint8), "F32")
    pool = _core.ThreadPool(threads)
    matrix = _core.GroupedMatrix(stored.open(), size, 1, arrays, 0.0, 1.0, values)
    y = _core.multiply_grouped([matrix], x, pool)
    matrix.flatten(pool)
    assert matrix.is_flat == matrix.can_flatten
    np.testing.assert_array_equal(_core.multiply_grouped([matrix], x, pool).view(np.uint32), y.view(np.uint32))
    return y


def dequantize(stored: StoredMatrix, rows: NDArray[np.int64], threads: int = 1) -> NDArray[np.float32]:
    """Some rows in float32."""
    return stored.open().dequantize(rows, _core.ThreadPool(threads))


def scale_values(scales: NDArray[Any] | LogScales) -> NDArray[np.float64]:
    """What the scales of a quantized matrix are."""
    return float_scales(scales).astype(np.float64)
