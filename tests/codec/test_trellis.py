"""The trellis of two grids: what symbols stand for, in half steps, and products of them."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from entrollm.codec import reference
from entrollm.codec.trellis import half_steps
from entrollm.format.code import Code, Field
from tests.codec.test_multiply import activations
from tests.support.isa_workers import InstructionSets
from tests.support.matrices import decode, dequantize, multiply, store


def symbols_of(rows: int, columns: int, seed: int, largest: int) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, largest, (rows, columns), np.uint8, endpoint=True)


@given(rows=st.integers(1, 3), columns=st.integers(1, 200), seed=st.integers(0, 2**32 - 1))
def test_half_steps_are_those_of_the_reference(rows: int, columns: int, seed: int) -> None:
    symbols = symbols_of(rows, columns, seed, 255)
    assert half_steps(symbols).tolist() == [reference.half_steps_of_row(row) for row in symbols.tolist()]


def test_half_steps_of_a_row_by_hand() -> None:
    # m = 0, 0, the parity of column 1, that of 2, of 1 and 3, of 2 and 4, of 1, 3 and 5.
    symbols = np.array([[5, 3, 4, 7, 1, 1, 127]], np.uint8)
    assert half_steps(symbols).tolist() == [[10, 6, 9, 14, 2, 3, 255]]


@pytest.mark.parametrize("shape", [(40, 70), (9, 5000)])
def test_every_instruction_set_multiplies_half_steps(instruction_sets: InstructionSets, shape: tuple[int, int]) -> None:
    generator = np.random.default_rng(shape[0])
    symbols = np.rint(generator.normal(63, 3, shape)).astype(np.uint8)
    symbols[:, ::50] = generator.integers(128, 256, symbols[:, ::50].shape)  # 2 k + m is then beyond a byte
    code = Code(Field(2, (62, 63, 64), Field(2, (61, 65, 60), Field(8, ()))))
    columns = generator.uniform(0.5, 2, shape[1]).tolist()
    coded = store(code, symbols, None, [0.5], [-63.25], columns, trellis=True)
    plain = store(Code(Field(8, ())), half_steps(symbols), None, [0.5], [-63.25], columns)
    rows = np.arange(shape[0])
    for name, steps in instruction_sets.each(decode, coded).items():
        np.testing.assert_array_equal(steps, half_steps(symbols), err_msg=name)
    for name, values in instruction_sets.each(dequantize, coded, rows).items():
        np.testing.assert_array_equal(values, dequantize(plain, rows), err_msg=name)
    for batch in (1, 3, 9, 40):
        x = activations((batch, shape[1]), batch)
        expected = multiply(plain, x).view(np.uint32)
        for name, y in instruction_sets.each(multiply, coded, x).items():
            np.testing.assert_array_equal(y.view(np.uint32), expected, err_msg=name)
