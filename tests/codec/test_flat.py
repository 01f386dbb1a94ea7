"""Flat matrices: transcoded from coded ones, with the same symbols, values and products on every instruction set."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from entrollm import _core
from entrollm.format.code import Code, Field
from tests.codec.test_multiply import activations, stored_matrices
from tests.support.isa_workers import InstructionSets
from tests.support.matrices import StoredMatrix, store

BATCHES = (1, 2, 3, 5, 8, 9, 40)


def products(stored: StoredMatrix, xs: list[NDArray[np.float32]]) -> list[tuple[NDArray, NDArray]]:
    """The flat and the coded products."""
    pool = _core.ThreadPool(2)
    coded = stored.open()
    flat = _core.FlatMatrix(coded, pool)
    return [(flat.multiply(x, pool), coded.multiply(x, pool)) for x in xs]


def assert_same_bits(found: NDArray[np.float32], expected: NDArray[np.float32]) -> None:
    np.testing.assert_array_equal(found.view(np.uint32), expected.view(np.uint32))


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(stored_matrices(), st.sampled_from(BATCHES), st.integers(0, 2**32))
def test_any_matrix_has_the_coded_products(
    instruction_sets: InstructionSets, case: tuple[StoredMatrix, NDArray[np.uint8]], batch: int, seed: int
) -> None:
    stored, symbols = case
    x = activations((batch, stored.shape[1]), seed)
    results = instruction_sets.each(products, stored, [x])
    for name, [(flat, coded)] in results.items():
        np.testing.assert_array_equal(flat.view(np.uint32), coded.view(np.uint32), err_msg=name)
        np.testing.assert_array_equal(flat.view(np.uint32), results["scalar"][0][0].view(np.uint32), err_msg=name)
    pool = _core.ThreadPool(1)
    coded_matrix = stored.open()
    matrix = _core.FlatMatrix(coded_matrix, pool)
    np.testing.assert_array_equal(matrix.decode(0, stored.shape[0], pool), symbols)
    rows = np.array([0, stored.shape[0] - 1, 0])
    assert_same_bits(matrix.dequantize(rows, pool), coded_matrix.dequantize(rows, pool))


@pytest.fixture(scope="module")
def crowded() -> Callable[[int, int, float], StoredMatrix]:
    """A function from rows, columns and a spread to a matrix of bytes that crowd around 90, with some strays."""

    def make(rows: int, columns: int, spread: float) -> StoredMatrix:
        generator = np.random.default_rng(columns)
        symbols = np.clip(np.rint(generator.normal(90, spread, (rows, columns))), 0, 255).astype(np.uint8)
        strays = generator.random((rows, columns)) < 0.003
        symbols[strays] = generator.integers(0, 256, int(strays.sum()), np.uint8)
        return store(Code(Field(8, ())), symbols, scale=generator.standard_normal(rows), offset=[-2.5])

    return make


@pytest.mark.parametrize("columns", [1, 63, 64, 65, 576, 4096, 65600])
@pytest.mark.parametrize("spread", [0.4, 2.0, 8.0, 40.0])
def test_widths_and_columns(
    instruction_sets: InstructionSets, crowded: Callable[..., StoredMatrix], columns: int, spread: float
) -> None:
    stored = crowded(3 if columns > 60_000 else 70, columns, spread)
    xs = [activations((batch, columns), batch) for batch in BATCHES]
    for name, results in instruction_sets.each(products, stored, xs).items():
        for flat, coded in results:
            np.testing.assert_array_equal(flat.view(np.uint32), coded.view(np.uint32), err_msg=name)


def test_each_width_is_chosen_where_it_is_the_cheapest(crowded: Callable[..., StoredMatrix]) -> None:
    pool = _core.ThreadPool(2)
    chosen = []
    for spread in (0.3, 1.1, 2.2, 5.0, 9.0, 18.0, 60.0):
        flat = _core.FlatMatrix(crowded(64, 4096, spread).open(), pool)
        assert sum(flat.rows_by_bits.values()) == 64
        chosen.append(max(flat.rows_by_bits))
        # Fields, patches of four bytes, and where those of a row begin, in two segments.
        fields = sum(rows * 4096 * bits // 8 for bits, rows in flat.rows_by_bits.items())
        assert fields <= flat.size_bytes <= fields + 4 * flat.patches + 2 * (4 * 33 + 4 * 64)
    assert chosen == [2, 3, 4, 5, 6, 7, 8]


def test_flat_and_coded_matrices_multiply_together(crowded: Callable[..., StoredMatrix]) -> None:
    pool = _core.ThreadPool(3)
    coded = [crowded(rows, 640, 3.0).open() for rows in (5, 70, 130)]
    flat = [_core.FlatMatrix(matrix, pool) for matrix in coded]
    for batch in BATCHES:
        x = activations((batch, 640), batch)
        expected = _core.multiply([coded[0], coded[1], coded[2]], x, pool)
        assert_same_bits(_core.multiply([flat[0], coded[1], flat[2]], x, pool), expected)
        assert_same_bits(_core.multiply([coded[0], flat[1], flat[2]], x, pool), expected)


def test_threads_do_not_change_a_bit(crowded: Callable[..., StoredMatrix]) -> None:
    coded = crowded(333, 1000, 4.0).open()
    x = activations((7, 1000), 1)
    expected = _core.FlatMatrix(coded, _core.ThreadPool(1)).multiply(x, _core.ThreadPool(1))
    for threads in (2, 5, 16):
        pool = _core.ThreadPool(threads)
        flat = _core.FlatMatrix(coded, pool)
        for batch in range(1, 8):
            assert_same_bits(flat.multiply(x[:batch], pool), expected[:batch])


def test_a_flat_matrix_outlives_the_coded_one(crowded: Callable[..., StoredMatrix]) -> None:
    pool = _core.ThreadPool(2)
    stored = crowded(40, 200, 3.0)
    coded = stored.open()
    x = activations((2, 200), 3)
    expected = coded.multiply(x, pool)
    flat = _core.FlatMatrix(coded, pool)
    del coded, stored
    assert_same_bits(flat.multiply(x, pool), expected)


def test_a_block_that_does_not_decode_is_refused() -> None:
    generator = np.random.default_rng(5)
    symbols = generator.integers(0, 4, (20, 640)).astype(np.uint8)
    stored = store(Code(Field(1, (0,), Field(2, (1, 2, 3, 3)))), symbols, scale=[1.0])
    stored.dense[: stored.dense.size // 2] ^= 0xFF  # other numbers of escapes
    with pytest.raises(_core.CorruptBlockError, match=r"block \d+ does not decode"):
        _core.FlatMatrix(stored.open(), _core.ThreadPool(2))


def test_rows_out_of_range_and_other_widths_are_refused(crowded: Callable[..., StoredMatrix]) -> None:
    pool = _core.ThreadPool(1)
    flat = _core.FlatMatrix(crowded(10, 100, 3.0).open(), pool)
    with pytest.raises(ValueError, match="rows out of range"):
        flat.decode(0, 11, pool)
    with pytest.raises(ValueError, match="row index out of range"):
        flat.dequantize(np.array([10]), pool)
    with pytest.raises(ValueError, match="x has 99 columns, the matrix has 100"):
        flat.multiply(np.zeros((1, 99), np.float32), pool)
