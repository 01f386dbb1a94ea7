"""Decoding in plain torch operations, against the reference codec and the native kernels."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from entrollm.codec.choose import choose_lossless_code
from entrollm.codec.reference import decode_matrix
from entrollm.codec.words import encode_words
from entrollm.errors import CorruptStreamError, UnsupportedError
from entrollm.format import layout
from entrollm.format.blocks import Blocks
from entrollm.format.code import Code, Field, Leaf, Split
from entrollm.format.grid import GridKind
from entrollm.format.spec import TensorSpec
from entrollm.torch.entries import to_tensor
from entrollm.torch.native import DecodedMatrix, open_native
from entrollm.torch.plain import PlainMatrix
from tests.support.folders import SPLIT_ROW, example_tensors
from tests.support.lossless_cases import lossless_cases
from tests.support.matrices import (
    StoredMatrix,
    block_shapes,
    codes,
    decode,
    dequantize,
    multiply,
    shapes,
    store,
    symbol_matrices,
)

CPU = torch.device("cpu")
CASES = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])


def plain(code: Code, stored: StoredMatrix, **spec: float | int) -> PlainMatrix:
    """The same matrix, decoded with torch."""
    arrays = {
        layout.DENSE: stored.dense,
        layout.SPARSE: stored.sparse,
        layout.SPARSE_SIZES: stored.sizes,
        layout.SCALE: stored.scale,
        layout.OFFSET: stored.offset,
        layout.COLUMN_SCALE: stored.column_scale,
    }
    entries = {suffix: to_tensor(array) for suffix, array in arrays.items() if array is not None and array.size}
    fields = {"scale": None, "offset": None} | spec
    if fields["scale"] is not None:
        del entries[layout.SCALE]
    described = TensorSpec(*stored.shape, "BF16", "", code, Blocks(*stored.blocks), GridKind(**fields))
    return PlainMatrix("w", described, entries, CPU)


def all_symbols(matrix: PlainMatrix, blocks: int, rows: int) -> np.ndarray:
    return matrix.symbols(torch.arange(-(-rows // blocks))).numpy()


@CASES
@given(st.data())
def test_symbols_are_those_of_the_reference(data: st.DataObject) -> None:
    code = data.draw(codes())
    rows, columns = data.draw(shapes(3000))
    symbols = data.draw(symbol_matrices(code, (rows, columns)))
    blocks = data.draw(block_shapes(rows, columns))
    stored = store(code, symbols, blocks)
    found = all_symbols(plain(code, stored), blocks.rows, rows)
    reference = decode_matrix(
        code, (rows, columns), blocks, stored.dense.tobytes(), stored.sparse.tobytes(), stored.sizes.tolist()
    )
    assert np.array_equal(found, np.array(reference, np.uint8))
    assert np.array_equal(found, symbols)


WIDE_CODE = Code(
    Field(2, (8, 12, 4), Split(Field(1, (0, 16)), Field(3, (20, 24, 28, 32, 36, 40, 44), Field(8, ())))), 2
)


@pytest.mark.parametrize("shape", [(1, 1), (3, 64), (37, 200), (5, 5000), (130, 70)])
def test_weights_are_those_of_the_native_kernels(shape: tuple[int, int]) -> None:
    generator = np.random.default_rng(3)
    symbols = np.minimum(generator.geometric(0.15, shape), 255).astype(np.uint8)
    scale = generator.uniform(0.01, 1, shape[0]).astype(np.float32)
    offset = generator.uniform(-3, 3, shape[0]).astype(np.float32)
    column_scale = generator.uniform(0.5, 2, shape[1]).astype(np.float32)
    stored = store(WIDE_CODE, symbols, None, scale.tolist(), offset.tolist(), column_scale.tolist())
    assert np.array_equal(decode(stored), symbols)
    matrix = plain(WIDE_CODE, stored)
    expected = dequantize(stored, np.arange(shape[0]))
    assert matrix.dequantize(torch.float32).numpy().tobytes() == expected.tobytes()
    ids = generator.integers(0, shape[0], 9)
    assert matrix.rows(torch.from_numpy(ids)).numpy().tobytes() == expected[ids].tobytes()
    x = generator.standard_normal((3, shape[1])).astype(np.float32)
    product = matrix.multiply(torch.from_numpy(x)).numpy()
    assert np.allclose(product, multiply(stored, x), rtol=1e-3, atol=1e-3 * np.abs(product).max())


def test_zero_symbol_and_bfloat16_scales() -> None:
    symbols = np.random.default_rng(4).integers(120, 136, (6, 80)).astype(np.uint8)
    code = Code(Field(4, tuple(range(120, 136))))
    scale = np.linspace(0.1, 1, 6).astype(ml_dtypes.bfloat16)
    exact = scale.astype(np.float32)
    native = store(code, symbols, None, exact.tolist(), (exact * np.float32(-128)).tolist())
    coded = store(code, symbols)
    matrix = plain(code, StoredMatrix(**{**vars_of(coded), "scale": scale}), zero=128)
    assert matrix.dequantize(torch.float32).numpy().tobytes() == dequantize(native, np.arange(6)).tobytes()


@pytest.mark.parametrize("columns", [1, 2, 3, 200])
def test_half_steps_of_a_trellis_are_those_of_the_native_kernels(columns: int) -> None:
    symbols = np.random.default_rng(columns).integers(56, 72, (9, columns)).astype(np.uint8)
    stored = store(Code(Field(4, tuple(range(56, 72)))), symbols, trellis=True)
    matrix = plain(Code(Field(4, tuple(range(56, 72)))), stored, trellis=True)
    assert matrix.dequantize(torch.float32).numpy().tobytes() == dequantize(stored, np.arange(9)).tobytes()
    assert matrix.rows(torch.tensor([8])).numpy().tobytes() == dequantize(stored, np.array([8])).tobytes()


def vars_of(stored: StoredMatrix) -> dict[str, object]:
    return {field: getattr(stored, field) for field in stored.__dataclass_fields__}


def test_constant_matrix_has_no_entries() -> None:
    code = Code(Leaf(9))
    matrix = plain(code, store(code, np.full((7, 3), 9, np.uint8)), scale=0.5)
    assert torch.equal(matrix.dequantize(torch.float32), torch.full((7, 3), 4.5))
    assert matrix.rows(torch.tensor([], dtype=torch.int64)).shape == (0, 3)


def test_entry_of_another_kind_is_refused() -> None:
    spec, arrays = example_tensors()[SPLIT_ROW]
    entries = {suffix: to_tensor(array) for suffix, array in (arrays | {".other": np.ones(1)}).items()}
    with pytest.raises(UnsupportedError, match="w: its entry other is not decoded by plain torch operations"):
        PlainMatrix("w", spec, entries, CPU)


def test_row_outside_of_the_matrix_is_refused() -> None:
    code = Code(Leaf(9))
    matrix = plain(code, store(code, np.full((7, 3), 9, np.uint8)), scale=0.5)
    for row in (-1, 7):
        with pytest.raises(IndexError, match="outside of its 7 rows"):
            matrix.rows(torch.tensor([0, row]))


@pytest.mark.parametrize("seed", range(40))
def test_damaged_lists_are_found_or_decode_as_the_reference_does(seed: int) -> None:
    """One changed byte of the sparse stream: both refuse it, or both give the same symbols."""
    spec, arrays = example_tensors()[SPLIT_ROW]
    generator = np.random.default_rng(seed)
    sparse = arrays[layout.SPARSE].copy()
    sparse[generator.integers(0, int(arrays[layout.SPARSE_SIZES].sum()))] ^= generator.integers(1, 256)
    entries = {suffix: to_tensor(array) for suffix, array in (arrays | {layout.SPARSE: sparse}).items()}
    matrix = PlainMatrix("w", spec, entries, CPU)
    shape, sizes = (spec.rows, spec.columns), arrays[layout.SPARSE_SIZES].tolist()
    try:
        expected = decode_matrix(spec.code, shape, spec.blocks, arrays[layout.DENSE].tobytes(), sparse.tobytes(), sizes)
    except CorruptStreamError:
        with pytest.raises(CorruptStreamError, match=r"w: the lists of a block do not fit it"):
            all_symbols(matrix, spec.blocks.rows, spec.rows)
    else:
        assert np.array_equal(all_symbols(matrix, spec.blocks.rows, spec.rows), np.array(expected, np.uint8))


@pytest.mark.parametrize("name", lossless_cases())
def test_lossless_words_decode_to_the_same_values(name: str) -> None:
    weights = lossless_cases()[name]
    spec, arrays = encode_words(weights, choose_lossless_code)
    entries = {suffix: to_tensor(array) for suffix, array in arrays.items()}
    expected = weights.astype(np.float32)
    ids = torch.tensor([len(weights) - 1, 0])
    for matrix in (PlainMatrix(name, spec, entries, CPU), DecodedMatrix(open_native(name, spec, entries), CPU)):
        np.testing.assert_array_equal(matrix.dequantize(torch.float32).numpy(), expected)
        np.testing.assert_array_equal(matrix.rows(ids).numpy(), expected[ids.numpy()])
        x = torch.linspace(-1, 1, 2 * weights.shape[1]).reshape(2, -1)
        torch.testing.assert_close(
            matrix.multiply(x), torch.nn.functional.linear(x, torch.from_numpy(expected)), equal_nan=True
        )
        with pytest.raises(IndexError, match="outside of its"):
            matrix.rows(torch.tensor([len(weights)]))
