"""The coded product: close to float64, and the same bits for any threads, batch and instruction set."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from entrollm import _core
from entrollm.codec.choose import choose_code
from entrollm.format.blocks import Blocks
from entrollm.format.code import Code, Field
from tests.support.isa_workers import InstructionSets
from tests.support.matrices import StoredMatrix, block_shapes, codes, decode, multiply, shapes, store, symbol_matrices

shared = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
# Activations are rounded to multiples of the largest magnitude / 32639.
_HALF_STEP = 0.5 / 32639


@st.composite
def stored_matrices(draw: st.DrawFn, most: int = 30_000) -> tuple[StoredMatrix, NDArray[np.uint8]]:
    """A matrix with every combination of scales."""
    code = draw(codes())
    rows, columns = draw(shapes(most))
    symbols = draw(symbol_matrices(code, (rows, columns)))
    generator = np.random.default_rng(draw(st.integers(0, 2**32)))
    scales = rows if draw(st.booleans()) else 1
    scale = generator.standard_normal(scales) * 10.0 ** draw(st.integers(-6, 6))
    offset = generator.standard_normal(scales) if draw(st.booleans()) else None
    column_scale = generator.standard_normal(columns) if draw(st.booleans()) else None
    return store(code, symbols, draw(block_shapes(rows, columns)), scale, offset, column_scale), symbols


def activations(shape: tuple[int, int], seed: int) -> NDArray[np.float32]:
    generator = np.random.default_rng(seed)
    magnitudes = 10.0 ** generator.integers(-20, 20, (shape[0], 1))
    return (generator.standard_normal(shape) * magnitudes).astype(np.float32)


def exact(stored: StoredMatrix, symbols: NDArray[np.uint8], x: NDArray[np.float32]) -> tuple[NDArray, NDArray]:
    """The product in float64, and a bound on the error of the coded one.

    Rounding an activation moves it by at most half a step, and by 2**-24 of itself where it is scaled by its column
    first; the sums are exact; the result is rounded to float32.
    """
    columns = symbols.astype(np.float64) * stored.scale.astype(np.float64)[:, None]
    if stored.offset is not None:
        columns = columns + stored.offset.astype(np.float64)[:, None]
    scaled = x.astype(np.float64)
    if stored.column_scale is not None:
        scaled = scaled * stored.column_scale
    product = scaled @ columns.T
    largest = np.abs(scaled).max(axis=1, keepdims=True) * _HALF_STEP * (1 + 1e-6)
    moved = largest + np.abs(scaled) * 2.0**-24
    return product, moved @ np.abs(columns).T + np.abs(product) * 2.0**-23 + 1e-44


@shared
@given(stored_matrices(), st.one_of(st.integers(1, 9), st.sampled_from([16, 17, 70, 133])), st.integers(0, 2**32))
def test_the_product_is_as_exact_as_16_bit_activations_allow(
    instruction_sets: InstructionSets, case: tuple[StoredMatrix, NDArray[np.uint8]], batch: int, seed: int
) -> None:
    stored, symbols = case
    x = activations((batch, stored.shape[1]), seed)
    expected, bound = exact(stored, symbols, x)
    results = instruction_sets.each(multiply, stored, x)
    for name, y in results.items():
        assert y.dtype == np.float32 and y.shape == (batch, stored.shape[0])
        assert (np.abs(y - expected) <= bound).all(), name
    reference = results["scalar"].view(np.uint32)
    for name, y in results.items():
        np.testing.assert_array_equal(y.view(np.uint32), reference, err_msg=name)


@settings(max_examples=40, deadline=None)
@given(stored_matrices(), st.integers(0, 2**32))
def test_threads_and_batch_do_not_change_a_bit(case: tuple[StoredMatrix, NDArray[np.uint8]], seed: int) -> None:
    stored, _ = case
    x = activations((70, stored.shape[1]), seed)
    matrix = stored.open()
    expected = np.concatenate([matrix.multiply(row[None], _core.ThreadPool(1)) for row in x])
    for threads in (1, 2, 5):
        pool = _core.ThreadPool(threads)
        for batch in (*range(1, 10), 15, 16, 17, 70):
            y = matrix.multiply(x[:batch], pool)
            np.testing.assert_array_equal(y.view(np.uint32), expected[:batch].view(np.uint32))


@pytest.mark.parametrize(
    "rows, columns", [(256_000, 24), (128_256, 64), (32_000, 384), (700, 576), (300, 3072), (50, 8192), (33, 14336)]
)
def test_shapes_of_models_on_1_to_64_threads(rows: int, columns: int) -> None:
    """Vocabularies and widths of published models, with the code that such a histogram would get."""
    generator = np.random.default_rng(rows)
    symbols = np.clip(np.rint(generator.normal(128, 1.3, (rows, columns))), 0, 255).astype(np.uint8)
    code = choose_code(np.bincount(symbols.reshape(-1), minlength=256).tolist(), rows, "speed", "avx512")
    stored = store(code, symbols, scale=[0.01], offset=[-1.28])
    x = generator.standard_normal((1, columns)).astype(np.float32)
    expected, bound = exact(stored, symbols, x)
    first = multiply(stored, x)
    assert (np.abs(first - expected) <= bound).all()
    picked = generator.integers(0, rows, 40)
    for threads in (2, 7, 64):
        pool = _core.ThreadPool(threads)
        matrix = stored.open()
        np.testing.assert_array_equal(matrix.multiply(x, pool), first)
        np.testing.assert_allclose(matrix.dequantize(picked, pool), symbols[picked] * 0.01 - 1.28, atol=1e-5)


def _simple(rows: int = 3, columns: int = 70) -> StoredMatrix:
    symbols = np.random.default_rng(0).integers(0, 4, (rows, columns), np.uint8)
    return store(Code(Field(2, (0, 1, 2, 3))), symbols, scale=[0.5], offset=[-1.0])


def test_a_vector_of_zeros_gives_zeros() -> None:
    assert (multiply(_simple(), np.zeros((2, 70), np.float32)) == 0).all()


def test_an_empty_batch_gives_an_empty_result() -> None:
    assert multiply(_simple(), np.zeros((0, 70), np.float32)).shape == (0, 3)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_stays_so_in_its_own_row(instruction_sets: InstructionSets, value: float) -> None:
    x = np.ones((3, 70), np.float32)
    x[1, 69] = value
    for name, y in instruction_sets.each(multiply, _simple(), x).items():
        assert np.isnan(y[1]).all(), name
        assert np.isfinite(y[[0, 2]]).all(), name


def test_the_largest_sums_do_not_overflow(instruction_sets: InstructionSets) -> None:
    """Every product at its largest magnitude, in the widest block, with either sign."""
    symbols = np.full((2, 4096), 255, np.uint8)
    stored = store(Code(Field(8, ())), symbols)
    for sign in (1, -1):
        for batch in (2, 5, 40):
            x = np.full((batch, 4096), sign * 3.0, np.float32)
            for name, y in instruction_sets.each(multiply, stored, x).items():
                np.testing.assert_array_equal(y, np.float32(sign * 3.0 * 255 * 4096), err_msg=name)


def test_very_wide_sums_do_not_overflow(instruction_sets: InstructionSets) -> None:
    """More columns than 32-bit sums of whole rows take."""
    columns = 65536 + 4096
    stored = store(Code(Field(1, (255,), Field(1, (255, 255)))), np.full((18, columns), 255, np.uint8))
    for batch in (1, 2, 9, 20):
        x = np.full((batch, columns), -3.0, np.float32)
        for name, y in instruction_sets.each(multiply, stored, x).items():
            np.testing.assert_array_equal(y, np.float32(-3.0 * 255 * columns), err_msg=name)


def test_the_smallest_float_survives(instruction_sets: InstructionSets) -> None:
    x = np.zeros((1, 70), np.float32)
    x[0, 0] = np.float32(1e-45)
    stored = store(Code(Field(1, (0, 1))), np.ones((2, 70), np.uint8))
    for name, y in instruction_sets.each(multiply, stored, x).items():
        np.testing.assert_array_equal(y, np.full((1, 2), 1e-45, np.float32), err_msg=name)


def test_x_of_another_width_is_refused() -> None:
    with pytest.raises(ValueError, match="x has 69 columns, the matrix has 70"):
        multiply(_simple(), np.zeros((1, 69), np.float32))


def test_rows_outside_the_matrix_are_refused() -> None:
    matrix, pool = _simple().open(), _core.ThreadPool(2)
    for begin, end in ((0, 4), (2, 1)):
        with pytest.raises(ValueError, match="rows out of range"):
            matrix.decode(begin, end, pool)
    for row in (-1, 3):
        with pytest.raises(ValueError, match="row index out of range"):
            matrix.dequantize(np.array([0, row]), pool)


def test_several_threads_may_use_one_pool(instruction_sets: InstructionSets) -> None:
    stored = _simple(40, 500)
    for name, same in instruction_sets.each(_multiply_from_threads, stored).items():
        assert same, name


def _multiply_from_threads(stored: StoredMatrix) -> bool:
    from concurrent.futures import ThreadPoolExecutor

    matrix, pool = stored.open(), _core.ThreadPool(2)
    x = activations((1, 500), 1)
    expected = matrix.multiply(x, pool)
    with ThreadPoolExecutor(4) as executor:
        results = list(executor.map(lambda _: matrix.multiply(x, pool), range(100)))
    return all(np.array_equal(y, expected) for y in results)


def test_a_damaged_block_is_named() -> None:
    code = Code(Field(1, (3,), Field(1, (1, 2))))
    stored = store(code, np.full((6, 4096), 3, np.uint8), Blocks(1, 4096))
    stored.dense[3 * 512] = 0xFF  # eight escapes that block 3 does not list
    for call in (decode, lambda s: multiply(s, np.ones((1, 4096), np.float32))):
        with pytest.raises(_core.CorruptBlockError, match="block 3 does not decode to its stated length"):
            call(stored)
    matrix = stored.open()
    with pytest.raises(_core.CorruptBlockError, match="block 3 does not decode"):
        matrix.dequantize(np.arange(6), _core.ThreadPool(2))
    assert (matrix.decode(0, 3, _core.ThreadPool(2)) == 3).all()


BAD_ARGUMENTS = {
    "short scale": ({"scale": np.ones(2, np.float32)}, "scale needs one entry or one a row"),
    "short offset": ({"offset": np.ones(2, np.float32)}, "offset needs one entry or one a row"),
    "short column scale": ({"column_scale": np.ones(2, np.float32)}, "column_scale needs one entry a column"),
    "short dense": ({"dense": np.zeros(64, np.uint8)}, "the dense stream has 64 bytes, expected 128"),
    "long dense": ({"dense": np.zeros(192, np.uint8)}, "the dense stream has 192 bytes, expected 128"),
    "short sparse": ({"sparse": np.zeros(64, np.uint8)}, "the sparse stream has 64 bytes, expected 128"),
    "no sizes": ({"sizes": np.zeros(0, np.uint16)}, "there are 0 sparse block sizes, expected 1"),
    "other size": ({"sizes": np.array([600], np.uint16)}, "the sparse stream has 128 bytes, expected 704"),
    "low bits": ({"low_bits": 7}, "low_bits must be between 0 and 6"),
}


@pytest.mark.parametrize("case", BAD_ARGUMENTS)
def test_parts_that_do_not_fit_are_refused(case: str) -> None:
    changes, message = BAD_ARGUMENTS[case]
    stored = store(Code(Field(1, (3,), Field(1, (1, 2)))), np.full((3, 70), 1, np.uint8))
    with pytest.raises(ValueError, match=message):
        StoredMatrix(**{**vars(stored), **changes}).open()


BAD_PROGRAMS = {
    "nothing": (b"", "ends early"),
    "cut leaf": (b"\x00", "ends early"),
    "cut field": (b"\x01\x02\x00\x01\x02\x03", "ends early"),
    "cut escape": (b"\x01\x01\x01\x05", "ends early"),
    "left over": (b"\x00\x05\x00", "left over"),
    "kind": (b"\x03", "unknown node kind"),
    "inner leaf": (b"\x02\x00\x05\x00\x06", "a leaf node below the root"),
    "no width": (b"\x01\x00\x00\x05", "impossible width"),
    "seven bits": (b"\x01\x07\x00" + bytes(128), "impossible width"),
    "raw escape": (b"\x01\x08\x01\x01\x08\x00", "impossible width"),
    "escape flag": (b"\x01\x01\x02\x05\x06", "impossible width"),
    "endless": (b"\x02" * 100, "too deep"),
}


@pytest.mark.parametrize("case", BAD_PROGRAMS)
def test_a_program_that_is_no_tree_is_refused(case: str) -> None:
    program, message = BAD_PROGRAMS[case]
    with pytest.raises(ValueError, match=message):
        _core.encode(program, 0, np.zeros((1, 64), np.uint8), 1, 64)


@pytest.mark.parametrize("low_bits", [-1, 7])
def test_low_bits_have_a_range(low_bits: int) -> None:
    with pytest.raises(ValueError, match="low_bits must be between 0 and 6"):
        _core.encode(b"\x00\x00", low_bits, np.zeros((1, 64), np.uint8), 1, 64)


@shared
@given(st.data())
def test_several_products_stand_side_by_side(instruction_sets: InstructionSets, data: st.DataObject) -> None:
    columns = data.draw(st.sampled_from([1, 64, 100, 576, 4097]))
    generator = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    group = []
    for _ in range(data.draw(st.integers(1, 4))):
        code = data.draw(codes())
        rows = data.draw(st.integers(1, 20))
        symbols = data.draw(symbol_matrices(code, (rows, columns)))
        column_scale = generator.standard_normal(columns) if data.draw(st.booleans()) else None
        scale = generator.standard_normal(rows)
        group.append(store(code, symbols, data.draw(block_shapes(rows, columns)), scale, None, column_scale))
    x = activations((data.draw(st.integers(1, 9)), columns), data.draw(st.integers(0, 2**32)))
    expected = np.concatenate([multiply(stored, x) for stored in group], axis=1)
    for name, y in instruction_sets.each(_multiply_group, group, x).items():
        np.testing.assert_array_equal(y.view(np.uint32), expected.view(np.uint32), err_msg=name)


def _multiply_group(group: list[StoredMatrix], x: NDArray[np.float32]) -> NDArray[np.float32]:
    return _core.multiply([stored.open() for stored in group], x, _core.ThreadPool(2))


def test_matrices_of_different_widths_are_refused() -> None:
    with pytest.raises(ValueError, match="x has 70 columns, the matrix has 71"):
        _multiply_group([_simple(), _simple(3, 71)], np.zeros((1, 70), np.float32))


def test_none_is_no_matrix() -> None:
    with pytest.raises(TypeError, match="a matrix is None"):
        _core.multiply([None], np.zeros((1, 70), np.float32), _core.ThreadPool(1))  # type: ignore[list-item]


def test_no_matrices_give_no_outputs() -> None:
    assert _multiply_group([], np.zeros((3, 70), np.float32)).shape == (3, 0)


def test_a_damaged_matrix_of_several_is_refused() -> None:
    good = _simple()
    bad = store(Code(Field(1, (3,), Field(1, (1, 2)))), np.full((3, 70), 3, np.uint8))
    bad.dense[0] = 0xFF
    with pytest.raises(_core.CorruptBlockError, match="does not decode to its stated length"):
        _multiply_group([good, bad], np.ones((1, 70), np.float32))
