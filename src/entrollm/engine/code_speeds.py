"""How fast the products of a model run on this machine with the paper's codes and with its own."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from entrollm import _core
from entrollm.codec.blocks import choose_blocks
from entrollm.codec.choose import choose_code
from entrollm.codec.flat import SEGMENT_ROWS
from entrollm.format.blocks import block_count
from entrollm.format.code import Code, Field
from entrollm.format.layout import padded_stream
from entrollm.format.lossless import LosslessKind
from entrollm.format.reader import CompressedModel
from entrollm.matrix import CodedMatrix, Product, matrix_of
from entrollm.quantize.method import ArraySource, Quantized
from entrollm.quantize.paper import PaperQuantizer

MOST_WEIGHTS = 1 << 27
"""Weights that are coded anew: more than caches hold at 2 bits, and a matter of seconds."""

# Names of the paper's grids in the table, and their bits.
_GRIDS = (("uint8", 8), ("uint4", 4))
_BYTES = Code(Field(8, ()))
_NO_STREAM = np.zeros(_core.SLACK_BYTES, np.uint8)
_CODED = ", Huffman"
_FROM_FILE, _FLAT = "this model, from the file", "this model, flat in memory"

_Multiply = Callable[[NDArray[np.float32], _core.ThreadPool], object]


@dataclass(frozen=True, slots=True)
class CodeSpeed:
    """The products of some matrices with one code.

    Attributes:
        code: its name in the table.
        bits: bits per weight that products read.
        rates: weights per second for each number of threads, the median of all rounds.
    """

    code: str
    bits: float
    rates: tuple[float, ...]


class _Form:
    """Some matrices with one code."""

    def __init__(self) -> None:
        self.size_bytes = 0
        self.products: list[tuple[int, _Multiply]] = []

    def add(self, columns: int, size_bytes: int, multiply: _Multiply) -> None:
        self.size_bytes += size_bytes
        self.products.append((columns, multiply))


def measure_codes(
    folder: str | Path, threads: Sequence[int], *, rounds: int, most_weights: int = MOST_WEIGHTS
) -> list[CodeSpeed]:
    """Time the products of one token with the matrices of a model, coded as in the paper and as they are.

    Each of the paper's grids spans the weights that a matrix of the model has now.

    Args:
        folder: made by `compress`.
        threads: numbers of threads.
        rounds: how often to time each code; they take turns.
        most_weights: how many weights to take; of a larger model, evenly spaced matrices, without those that are larger
            by themselves unless all are.
    Returns:
        the speeds, uint8 first. The flat form is absent if a matrix has none.
    Raises:
        FormatError, UnsupportedError: the folder cannot be read.
        CorruptStreamError: a block does not decode.
        ValueError: the folder has no coded matrix.
    """
    model = CompressedModel.open(folder)
    if not model.specs:
        raise ValueError(f"{folder} has no coded matrix, so that there is nothing to time")
    sizes = {name: spec.rows * spec.columns for name, spec in model.specs.items()}
    matrices = [matrix_of(model, name) for name in _taken(sizes, most_weights)]
    pools = [_core.ThreadPool(count) for count in threads]
    forms = {f"{name}{coded}": _Form() for name, _ in _GRIDS for coded in ("", _CODED)}
    for matrix in matrices:
        weights = matrix.dequantize(np.arange(matrix.spec.rows), pools[-1])
        for name, bits in _GRIDS:
            integers = PaperQuantizer(bits).quantize(ArraySource(matrix.name, weights), partial(choose_code, blocks=1))
            if bits == 4:
                scales = np.asarray(integers.scale, np.float32)
                flat = flat_nibbles(integers.symbols, scales, integers.offset, pools[-1])
                forms[name].add(integers.symbols.shape[1], flat.size_bytes, flat.multiply)
            else:
                _add_coded(forms[name], integers, _BYTES)
            _add_coded(forms[name + _CODED], integers)
    forms[_FROM_FILE] = _own_form(matrices)
    if all(matrix.can_be_flat for matrix in matrices):
        forms[_FLAT] = _own_form([matrix.to_flat(pools[-1]) for matrix in matrices])
    taken = sum(matrix.spec.rows * matrix.spec.columns for matrix in matrices)
    seconds = _time(forms, pools, rounds)
    return [
        CodeSpeed(name, form.size_bytes * 8 / taken, tuple(taken / s for s in seconds[name]))
        for name, form in forms.items()
    ]


def _taken(sizes: Mapping[str, int], most: int) -> list[str]:
    """Evenly spaced matrices of at most `most` weights together, or the smallest one if each has more."""
    names = [name for name, size in sizes.items() if size <= most] or [min(sizes, key=lambda name: sizes[name])]
    taken: list[str] = []
    left = most
    for name in names[:: -(-sum(sizes[name] for name in names) // most)]:
        if sizes[name] <= left or not taken:
            taken.append(name)
            left -= sizes[name]
    return taken


def flat_nibbles(
    symbols: NDArray[np.uint8], scales: NDArray[np.float32], offsets: NDArray[np.float32] | None, pool: _core.ThreadPool
) -> _core.FlatMatrix:
    """Integers of 4 bits as flat fields, which are multiplied faster than any other layout of them.

    Args:
        symbols: below 16, shape (rows, columns).
        scales, offsets: of the rows, or one for all; None for offsets of 0.
        pool: makes the matrix.
    """
    windows = np.full(-(-len(symbols) // SEGMENT_ROWS), 4, np.uint16)  # fields from symbol 0 on
    fields, _, sizes, windows = _core.encode_flat(symbols, SEGMENT_ROWS, windows)
    rows, columns = symbols.shape
    stored = _core.FlatMatrix.open(
        (rows, columns),
        SEGMENT_ROWS,
        windows,
        padded_stream([fields]),
        _NO_STREAM,
        sizes[:0],
        scales,
        offsets,
        None,
    )
    return stored.copy(pool)


def _add_coded(form: _Form, integers: Quantized, code: Code | None = None) -> None:
    """Integers in a code, by default the smallest one."""
    rows, columns = integers.symbols.shape
    blocks = choose_blocks(rows, columns)
    counts = [int(count) for count in integers.counts]
    chosen = code or choose_code(counts, block_count(rows, columns, blocks), can_be_flat=False)
    assert isinstance(chosen, Code)
    program, low_bits = chosen.program(), chosen.low_bits
    dense, sparse, sizes = _core.encode(program, low_bits, integers.symbols, blocks.rows, blocks.columns)
    if not sparse.size:
        sizes = sizes[:0]
    native = _core.CodedMatrix(
        program,
        low_bits,
        _core.Geometry(rows, columns, blocks.rows, blocks.columns),
        padded_stream([dense]) if dense.size else _NO_STREAM,
        padded_stream([sparse]) if sparse.size else _NO_STREAM,
        sizes,
        np.asarray(integers.scale, np.float32),
        integers.offset,
        None,
    )
    form.add(columns, dense.nbytes + sparse.nbytes + sizes.nbytes, native.multiply)


def _own_form(matrices: Sequence[CodedMatrix]) -> _Form:
    form = _Form()
    for matrix in matrices:
        scales = 0 if matrix.groups is None else sum(array.nbytes for array in matrix.groups.arrays.values())
        has_low = isinstance(matrix.spec.kind, LosslessKind) and matrix.spec.kind.has_low
        low = matrix.spec.rows * matrix.spec.columns if has_low else 0
        size = matrix.stored_bytes if matrix.flat_bytes is None else matrix.flat_bytes + scales + low
        form.add(matrix.spec.columns, size, Product([matrix]))
    return form


def _time(forms: Mapping[str, _Form], pools: Sequence[_core.ThreadPool], rounds: int) -> dict[str, list[float]]:
    """The median seconds of the products of each form, by number of threads, after one round to warm up."""
    columns = {width for form in forms.values() for width, _ in form.products}
    inputs = {n: np.random.default_rng(0).standard_normal((1, n)).astype(np.float32) for n in columns}
    found: dict[str, list[float]] = {name: [] for name in forms}
    for pool in pools:
        seconds: dict[str, list[float]] = {name: [] for name in forms}
        for _ in range(rounds + 1):
            for name, form in forms.items():
                begin = time.perf_counter()
                for width, multiply in form.products:
                    multiply(inputs[width], pool)
                seconds[name].append(time.perf_counter() - begin)
        for name, times in seconds.items():
            found[name].append(statistics.median(times[1:]))
    return found
