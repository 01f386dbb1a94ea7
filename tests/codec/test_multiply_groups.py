"""The product with group scales: close to float64, and the same bits for any threads, batch and instruction set."""

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
from tests.support.matrices import block_shapes, codes, multiply_groups, shapes, store, symbol_matrices

RAW = Code(Field(8, ()))


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data(), st.integers(1, 9), st.integers(0, 2**32))
def test_the_product_is_as_exact_as_16_bit_activations_allow(
    instruction_sets: InstructionSets, data: st.DataObject, batch: int, seed: int
) -> None:
    code = data.draw(codes())
    rows, columns = data.draw(shapes(30_000))
    symbols = data.draw(symbol_matrices(code, (rows, columns)))
    stored = store(code, symbols, data.draw(block_shapes(rows, columns)))
    size = data.draw(st.sampled_from([1, 4, 8, 12, 16, 32, 64, 128, 192, 1024, 2**31]) | st.integers(1, columns + 3))
    generator = np.random.default_rng(seed)
    shape = (rows, -(-columns // size))
    scale = generator.standard_normal(shape).astype(np.float32)
    shift = generator.standard_normal(shape).astype(np.float32) * 50 if data.draw(st.booleans()) else None
    values = generator.standard_normal(256).astype(np.float32) if data.draw(st.booleans()) else None
    x = generator.standard_normal((batch, columns)).astype(np.float32)

    group = np.arange(columns) // size
    weights = (symbols if values is None else values[symbols]).astype(np.float64) * scale[:, group]
    if shift is not None:
        weights += shift[:, group]
    expected = x.astype(np.float64) @ weights.T
    step = np.abs(x).max(axis=1, keepdims=True) / 65000 + np.abs(x) * 2.0**-23
    bound = step @ np.abs(weights).T + np.abs(expected) * 2.0**-23 + 1e-30
    # Sums over groups are in float32, and a group's products may cancel its shift.
    terms = np.abs((symbols if values is None else values[symbols]) * scale[:, group].astype(np.float64))
    terms += 0 if shift is None else np.abs(shift[:, group])
    bound += np.abs(x) @ terms.T * 2.0**-21
    flat = None if shift is None else shift.reshape(-1)
    results = instruction_sets.each(multiply_groups, stored, x, size, scale.reshape(-1), flat, values)
    for name, y in results.items():
        assert (np.abs(y - expected) <= bound).all(), name
        np.testing.assert_array_equal(y.view(np.uint32), results["scalar"].view(np.uint32), err_msg=name)
    for threads in (2, 5):
        again = multiply_groups(stored, x, size, scale.reshape(-1), flat, values, threads)
        np.testing.assert_array_equal(again.view(np.uint32), results["scalar"].view(np.uint32))
    one = multiply_groups(stored, x[-1:], size, scale.reshape(-1), flat, values)
    np.testing.assert_array_equal(one[0].view(np.uint32), results["scalar"][-1].view(np.uint32))


@pytest.mark.parametrize(
    ("symbols", "bits"),
    [
        (np.arange(0, 241, 15), 8),
        (np.arange(0, 240, 15), 4),
        (np.arange(4, 128, 8), 4),
        (np.array([0, 25, 60, 170, 200, 255]), 3),
        (np.array([9, 24, 86]), 3),
        (np.arange(7), 3),
    ],
    ids=["17 symbols", "16 of 8 bits", "16 of 7 bits", "6 of 8 bits", "3 of 7 bits", "7 of 3 bits"],
)
@pytest.mark.parametrize("size", [8, 32, 128])
def test_few_symbols_are_numbered(
    instruction_sets: InstructionSets, symbols: NDArray[np.int64], bits: int, size: int
) -> None:
    generator = np.random.default_rng(size)
    columns = 2240
    code = choose_code(np.isin(np.arange(256), symbols).astype(int).tolist(), 1)
    assert isinstance(code, Code)
    stored = store(code, generator.choice(symbols, (5, columns)).astype(np.uint8), Blocks(5, 1024))
    scale = generator.standard_normal(5 * -(-columns // size)).astype(np.float32)
    matrix = _core.GroupedMatrix(stored.open(), size, 1, {"group_scale": (scale.view(np.uint8), "F32")}, 0.0, 1.0, None)
    matrix.flatten(_core.ThreadPool(1))
    assert matrix.bits == bits
    for batch in (1, 3, 9):
        x = generator.standard_normal((batch, columns)).astype(np.float32)
        results = instruction_sets.each(multiply_groups, stored, x, size, scale, None)
        for name, y in results.items():
            np.testing.assert_array_equal(y.view(np.uint32), results["scalar"].view(np.uint32), err_msg=name)


def ones(*shape: int) -> NDArray[np.float32]:
    return np.ones(shape, np.float32)


def test_the_largest_sums_fit(instruction_sets: InstructionSets) -> None:
    columns = 1000
    stored = store(RAW, np.full((17, columns), 255, np.uint8))
    x = np.array([[1], [-1]], np.float32) * ones(2, columns)
    for name, y in instruction_sets.each(multiply_groups, stored, x, 2**31, ones(17), None).items():
        np.testing.assert_allclose(y, [[255 * columns] * 17, [-255 * columns] * 17], rtol=1e-6, err_msg=name)


def test_terms_that_do_not_fit_are_refused() -> None:
    stored = store(RAW, np.zeros((2, 100), np.uint8))
    with pytest.raises(ValueError, match="groups must have columns"):
        multiply_groups(stored, ones(1, 100), 0, ones(8), None)
    for scale, shift in ((ones(7), None), (ones(8), ones(9))):
        with pytest.raises(ValueError, match="an array of group scales has"):
            multiply_groups(stored, ones(1, 100), 32, scale, shift)
    with pytest.raises(ValueError, match="there must be a value for each symbol"):
        multiply_groups(stored, ones(1, 100), 32, ones(8), None, ones(255))
    with pytest.raises(ValueError, match="x has 99 columns, the matrix has 100"):
        multiply_groups(stored, ones(1, 99), 32, ones(8), None)


def test_activations_that_are_not_finite_give_nan() -> None:
    stored = store(RAW, np.full((2, 70), 3, np.uint8))
    x = ones(2, 70)
    x[0, 5] = np.inf
    y = multiply_groups(stored, x, 32, ones(6), ones(6))
    assert np.isnan(y[0]).all() and (y[1] == 280).all()


def test_damage_is_noticed() -> None:
    generator = np.random.default_rng(0)
    code = Code(Field(1, (0,), Field(2, (1, 2, 3, 4))))
    stored = store(code, generator.choice(5, (8, 512)).astype(np.uint8))
    stored.sizes[0] += 1
    with pytest.raises(ValueError):
        multiply_groups(stored, ones(1, 512), 128, ones(32), None)
