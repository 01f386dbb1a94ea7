"""Types of the native module."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

VECTOR: int
SLACK_BYTES: int
MAX_BLOCK: int
MAX_BLOCK_COLUMNS: int
MOST_TRELLIS_COLUMNS: int
TRELLIS_ZERO: int

class CorruptBlockError(ValueError): ...

def isa() -> str: ...
def isas() -> list[tuple[str, bool]]: ...

class ThreadPool:
    """Threads that share loops; between two of them they stay awake for `spin_us` microseconds."""

    def __init__(self, threads: int, spin_us: int = 200) -> None: ...
    @property
    def size(self) -> int: ...

class Geometry:
    def __init__(self, rows: int, columns: int, block_rows: int, block_columns: int) -> None: ...
    @property
    def blocks(self) -> int: ...

class CodedMatrix:
    """A matrix that stays coded. With a trellis, `decode` gives half steps in the place of symbols."""

    def __init__(
        self,
        program: bytes,
        low_bits: int,
        geometry: Geometry,
        dense: NDArray[np.uint8],
        sparse: NDArray[np.uint8],
        sparse_sizes: NDArray[np.uint16],
        scale: NDArray[np.float32],
        offset: NDArray[np.float32] | None,
        column_scale: NDArray[np.float32] | None,
        trellis: bool = False,
    ) -> None: ...
    def multiply(self, x: NDArray[np.float32], pool: ThreadPool) -> NDArray[np.float32]: ...
    def decode(self, begin: int, end: int, pool: ThreadPool) -> NDArray[np.uint8]: ...
    def dequantize(self, rows: NDArray[np.int64], pool: ThreadPool) -> NDArray[np.float32]: ...

class FlatMatrix:
    """A matrix in the flat form: a coded one transcoded to memory of its own, or one that is stored in this form.

    Attributes:
        is_in_place: whether it is read from the arrays that it was opened with.
        size_bytes: memory of its own.
        patches: how many corrections there are of weights outside of their segment's fields.
        rows_by_bits: how many rows have fields of each width.
    """

    def __init__(self, coded: CodedMatrix, pool: ThreadPool) -> None: ...
    @staticmethod
    def open(
        shape: tuple[int, int],
        segment_rows: int,
        windows: NDArray[np.uint16],
        fields: NDArray[np.uint8],
        patches: NDArray[np.uint8],
        row_sizes: NDArray[np.uint16],
        scale: NDArray[np.float32],
        offset: NDArray[np.float32] | None,
        column_scale: NDArray[np.float32] | None,
        trellis: bool = False,
    ) -> FlatMatrix: ...
    def copy(self, pool: ThreadPool) -> FlatMatrix:
        """The same matrix in memory of its own, in huge pages where the system grants them."""

    @property
    def is_in_place(self) -> bool: ...
    @property
    def size_bytes(self) -> int: ...
    @property
    def patches(self) -> int: ...
    @property
    def rows_by_bits(self) -> dict[int, int]: ...
    def multiply(self, x: NDArray[np.float32], pool: ThreadPool) -> NDArray[np.float32]: ...
    def decode(self, begin: int, end: int, pool: ThreadPool) -> NDArray[np.uint8]: ...
    def dequantize(self, rows: NDArray[np.int64], pool: ThreadPool) -> NDArray[np.float32]: ...

class GroupedMatrix:
    """A coded matrix with scales of groups of columns.

    Args:
        coded: its symbols.
        size: columns of a scale group.
        ratio: scale groups that share a super scale.
        arrays: by a name of `group_scales.GROUP_ARRAY_TYPES`, the bytes of an array and the safetensors name of its
            type.
        zero: the symbol that stands for 0, where the arrays hold none.
        factor: multiplies all weights.
        values: what the 256 symbols stand for; None if they stand for themselves.
    """

    def __init__(
        self,
        coded: CodedMatrix,
        size: int,
        ratio: int,
        arrays: dict[str, tuple[NDArray[np.uint8], str]],
        zero: float,
        factor: float,
        values: NDArray[np.float32] | None,
    ) -> None: ...
    def flatten(self, pool: ThreadPool) -> None:
        """Copy the symbols to memory in the flat form, which products are faster from; keeps odd sizes coded."""
    @property
    def can_flatten(self) -> bool: ...
    @property
    def is_flat(self) -> bool: ...
    @property
    def bits(self) -> int:
        """The width of the flat fields; 0 while coded."""
    @property
    def size_bytes(self) -> int:
        """Bytes of the flat fields."""

class LosslessMatrix:
    """A coded or flat matrix whose weights keep the bits that they had.

    Args:
        symbols: the high bytes of its words, rotated left by one bit.
        low: the low bytes with their padding; None for words of 8 bits.
        type: of the words, by its safetensors name.
    """

    def __init__(self, symbols: CodedMatrix | FlatMatrix, low: NDArray[np.uint8] | None, type: str) -> None: ...
    def with_symbols(self, symbols: FlatMatrix) -> LosslessMatrix:
        """The same matrix with its high bytes in the flat form."""

    def words(self, begin: int, end: int, pool: ThreadPool) -> NDArray[np.uint8]:
        """The bytes of the words of some rows: uint8 (end - begin, bytes of a row)."""

    def dequantize(self, rows: NDArray[np.int64], pool: ThreadPool) -> NDArray[np.float32]: ...

def split_words(words: NDArray[np.uint16], high: NDArray[np.uint8], low: NDArray[np.uint8]) -> None:
    """Write the high and the low bytes of words that are rotated left by one bit, to arrays of the words' shape."""

def multiply_lossless(
    matrices: list[LosslessMatrix], x: NDArray[np.float32], pool: ThreadPool
) -> NDArray[np.float32]: ...
def multiply_grouped(
    matrices: list[GroupedMatrix], x: NDArray[np.float32], pool: ThreadPool
) -> NDArray[np.float32]: ...
def multiply(
    matrices: list[CodedMatrix | FlatMatrix], x: NDArray[np.float32], pool: ThreadPool
) -> NDArray[np.float32]: ...
def encode(
    program: bytes, low_bits: int, symbols: NDArray[np.uint8], block_rows: int, block_columns: int
) -> tuple[NDArray[np.uint8], NDArray[np.uint8], NDArray[np.uint16]]: ...
def rms_norm(x: NDArray[np.float32], weight: NDArray[np.float32], eps: float, pool: ThreadPool) -> NDArray[np.float32]:
    """Divide by the root of the mean square over the last axis, then multiply by `weight`.

    Args:
        x: (..., features), contiguous, of up to three axes.
        weight: (..., features); its rows are taken in turn for those of x.
        eps: added to the mean square.
    Returns:
        A new array like x.
    """

def rotate(x: NDArray[np.float32], cosines: NDArray[np.float32], sines: NDArray[np.float32], pool: ThreadPool) -> None:
    """Rotate feature i with feature i + rotary_dim / 2 of every head, in place; features from rotary_dim on stay.

    Args:
        x: (n, heads, head_dim).
        cosines, sines: (n, 1, rotary_dim / 2).
    """

def swiglu(gate_up: NDArray[np.float32], pool: ThreadPool) -> NDArray[np.float32]:
    """gate * sigmoid(gate) * up of (n, 2 * features), gate first -> a new (n, features)."""

def geglu(gate_up: NDArray[np.float32], pool: ThreadPool) -> NDArray[np.float32]:
    """gelu(gate) * up, with the approximation of gelu by a hyperbolic tangent; otherwise as swiglu."""

_Run = tuple[NDArray[Any], NDArray[Any], NDArray[np.float32] | None]
_Positions = tuple[int, NDArray[Any], NDArray[Any], int | None, NDArray[np.float32] | None, Sequence[_Run]]

def attention(
    queries: NDArray[np.float32],
    keys: NDArray[Any],
    values: NDArray[Any],
    window: int | None,
    pool: ThreadPool,
    scales: NDArray[np.float32] | None = None,
    earlier: Sequence[_Run] = (),
) -> NDArray[np.float32]:
    """Causal attention with grouped heads.

    Args:
        queries: (n, heads, head_dim); the last n positions of the `length`.
        keys: float32, float16 or int8 (kv_heads, head_dim, length); length >= n and heads a multiple of kv_heads.
        values: (kv_heads, length, head_dim), of the same type.
        window: how many positions back, itself included, a query sees; None for all.
        scales: of int8 keys and of values, (2, kv_heads, length), as `append` writes them; None for other types.
        earlier: keys, values and scales of positions before these. The result has the same bits as with all in one if
            each holds a multiple of 256 positions and there is no window.
    Returns:
        A new (n, heads * head_dim).
    """

def append(
    new_keys: NDArray[np.float32],
    new_values: NDArray[np.float32],
    keys: NDArray[Any],
    values: NDArray[Any],
    scales: NDArray[np.float32] | None,
    pool: ThreadPool,
) -> None:
    """Write the last positions of keys and values; integers are of heads that a Hadamard transform has mixed.

    Args:
        new_keys, new_values: (n, kv_heads, head_dim), lying alike.
        keys, values, scales: as for `attention`, the new positions included.
    """

def encode_flat(
    symbols: NDArray[np.uint8], segment_rows: int, windows: NDArray[np.uint16]
) -> tuple[NDArray[np.uint8], NDArray[np.uint16], NDArray[np.uint16], NDArray[np.uint16]]: ...

class JoinedProduct:
    """The product with several matrices side by side, plus a bias.

    Args:
        name: for errors.
        matrices: all with scale groups, all lossless, or none of both.
        bias: (sum of rows,); None for none.
    """

    def __init__(
        self,
        name: str,
        matrices: Sequence[CodedMatrix | FlatMatrix] | Sequence[GroupedMatrix] | Sequence[LosslessMatrix],
        bias: NDArray[np.float32] | None,
    ) -> None: ...

class Surroundings:
    """What is around a part of a layer: x + scale * output_norm(part(norm(x))).

    Args:
        norm, output_norm: weights of root-mean-square norms, (features,); None for none.
        eps: of the norms.
        scale: None for 1.
    """

    def __init__(
        self,
        norm: NDArray[np.float32] | None,
        output_norm: NDArray[np.float32] | None,
        eps: float,
        scale: float | None,
    ) -> None: ...

class AttentionShape:
    """The heads of attention, and what queries are multiplied by; None for 1."""

    def __init__(self, heads: int, kv_heads: int, head_dim: int, query_factor: float | None) -> None: ...

class AttentionBlock:
    """Attention with what is around it.

    Args:
        qkv, output: the products before and after.
        surroundings: norms and scale.
        shape: the heads.
        head_norms: weights of the norms of each head of queries and keys, ((heads + kv_heads) * head_dim,); or
        query_norm, key_norm: of their whole width. None for none.
    """

    def __init__(
        self,
        qkv: JoinedProduct,
        output: JoinedProduct,
        surroundings: Surroundings,
        shape: AttentionShape,
        head_norms: NDArray[np.float32] | None,
        query_norm: NDArray[np.float32] | None,
        key_norm: NDArray[np.float32] | None,
    ) -> None: ...
    def __call__(
        self,
        x: NDArray[np.float32],
        cosines: NDArray[np.float32] | None,
        sines: NDArray[np.float32] | None,
        query_factors: NDArray[np.float32] | None,
        sequences: Sequence[_Positions],
        pool: ThreadPool,
    ) -> NDArray[np.float32]:
        """Run the rows of some sequences: (n, features) -> a new (n, features).

        Args:
            x: the rows of each sequence in turn.
            cosines, sines: (n, ..., at most head_dim / 2); None to rotate nothing.
            query_factors: n factors; None for 1.
            sequences: of each, the number of its rows, and as for `attention` its keys, values, window, scales and
                earlier. Keys and values of the rows, which are the last positions, are written.
        """

class FeedForwardBlock:
    """A gated feed-forward part with what is around it.

    Args:
        up: the product that gives gates and what they multiply, gates first.
        down: the product after.
        surroundings: norms and scale.
        is_gelu: the gate is that of `geglu`, not of `swiglu`.
    """

    def __init__(self, up: JoinedProduct, down: JoinedProduct, surroundings: Surroundings, is_gelu: bool) -> None: ...
    def __call__(self, x: NDArray[np.float32], pool: ThreadPool) -> NDArray[np.float32]:
        """(n, features) -> a new (n, features)."""

def histogram(symbols: NDArray[np.uint8]) -> NDArray[np.int64]: ...
def round_trellis(
    left: NDArray[np.float32],
    reach: NDArray[np.float32] | None,
    weights: NDArray[np.float32],
    prices: NDArray[np.float32],
    start: NDArray[np.float32],
    has_origin: bool,
) -> NDArray[np.float32]:
    """Round the columns of a block to the cheapest paths of a trellis, the last column first.

    Args:
        left: shape (columns, rows), 1 to MOST_TRELLIS_COLUMNS columns, in steps.
        reach: shape (columns, columns), what a 1 in a column takes from each before it; None if that is nothing.
        weights: shape (columns,), what the square of an error costs.
        prices: shape (2 * TRELLIS_ZERO,), of the symbols, in squared steps.
        start: shape (4, rows), what it costs to begin in a state; see `quantize.trellis`.
        has_origin: whether the first column is that of the matrix.
    Returns:
        Integers, or integers and a half, in the shape of `left`.
    """
