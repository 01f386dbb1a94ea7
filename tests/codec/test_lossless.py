"""Words of lossless matrices: divided as the reference does, and multiplied in float32 in the stated order."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from entrollm import _core
from entrollm.codec.choose import choose_lossless_code
from entrollm.codec.reference import divide_word, join_word
from entrollm.codec.words import divide, encode_words, word_type
from entrollm.errors import CorruptStreamError
from entrollm.format import layout
from entrollm.format.blocks import Blocks
from entrollm.format.code import Code, Field
from entrollm.format.lossless import LosslessKind
from entrollm.format.spec import TensorSpec
from entrollm.matrix import CodedMatrix, multiply, open_matrix
from tests.support.isa_workers import InstructionSets
from tests.support.lossless_cases import BF16, lossless_cases

POOL = _core.ThreadPool(2)


def _open(name: str) -> tuple[CodedMatrix, np.ndarray[Any, np.dtype[Any]]]:
    weights = lossless_cases()[name]
    spec, arrays = encode_words(weights, choose_lossless_code)
    return open_matrix(name, spec, arrays), weights


@pytest.mark.parametrize("kind", ["BF16", "F16", "F8_E4M3", "F8_E5M2"])
def test_words_are_divided_as_the_reference_divides_them(kind: str) -> None:
    bits = 16 if LosslessKind(kind).has_low else 8
    words = np.arange(1 << bits).astype(f"u{bits // 8}").reshape(4, -1)
    symbols, low = divide(LosslessKind(kind), words)
    expected = [divide_word(int(word), bits) for word in words.reshape(-1)]
    assert symbols.reshape(-1).tolist() == [symbol for symbol, _ in expected]
    assert (low is None) == (bits == 8)
    if low is not None:
        assert low.reshape(-1).tolist() == [rest for _, rest in expected]
    assert [join_word(*pair, bits) for pair in expected] == list(range(1 << bits))


def test_parts_of_another_shape_are_refused() -> None:
    words = np.zeros((2, 3), np.uint16)
    parts = np.empty((2, 3), np.uint8), np.empty((3, 2), np.uint8)
    with pytest.raises(ValueError, match="the parts must have the shape of the words"):
        _core.split_words(words, *parts)


def test_only_float32_that_is_bfloat16_has_words() -> None:
    assert word_type(np.array([[1.5, -0.0, np.inf]], np.float32)) == "BF16"
    assert word_type(np.array([[1.5, 0.1]], np.float32)) is None
    assert word_type(np.ones((1, 2))) is None


@pytest.mark.parametrize(
    "name", ["bf16.weight", "f16.weight", "f32.weight", "e4m3.weight", "e5m2.weight", "parts.weight"]
)
def test_products_are_those_of_float32(name: str) -> None:
    matrix, weights = _open(name)
    x = np.random.default_rng(3).standard_normal((37, weights.shape[1]), np.float32)
    exact = x.astype(np.float64) @ weights.astype(np.float64).T
    bound = np.abs(x).astype(np.float64) @ np.abs(weights.astype(np.float64)).T
    found = multiply([matrix], x, POOL)
    np.testing.assert_array_less(np.abs(found - exact), 1e-6 * bound)
    flat = matrix.to_flat(POOL)
    for count in (1, 2, 4, 8, 11):  # neither a batch nor the form changes the bits
        np.testing.assert_array_equal(multiply([matrix], x[:count], _core.ThreadPool(1)), found[:count])
        np.testing.assert_array_equal(multiply([flat], x[:count], _core.ThreadPool(1)), found[:count])
    both = multiply([matrix, flat], x, POOL)
    np.testing.assert_array_equal(both, np.concatenate([found, found], axis=1))


@pytest.mark.parametrize("name", sorted(lossless_cases()))
def test_the_flat_form_has_the_same_words(name: str) -> None:
    matrix, weights = _open(name)
    flat = matrix.to_flat(POOL)
    assert flat.original(0, len(weights), POOL).tobytes() == weights.tobytes()
    assert flat.original(1, len(weights), POOL).tobytes() == weights[1:].tobytes()
    last = np.array([len(weights) - 1])
    assert flat.dequantize(last, POOL).tobytes() == matrix.dequantize(last, POOL).tobytes()


def _product_bits(name: str) -> bytes:
    matrix, weights = _open(name)
    x = np.random.default_rng(4).standard_normal((14, weights.shape[1]), np.float32)
    forms = (matrix, matrix.to_flat(POOL))
    return b"".join(multiply([form], x[:count], _core.ThreadPool(1)).tobytes() for form in forms for count in (3, 14))


@pytest.mark.parametrize("name", ["bf16.weight", "f16.weight", "e5m2.weight", "parts.weight"])
def test_instruction_sets_give_the_same_bits(name: str, instruction_sets: InstructionSets) -> None:
    found = instruction_sets.each(_product_bits, name)
    assert len(set(found.values())) == 1, list(found)


def _fused_bits(code: Code, blocks: Blocks) -> bytes:
    """Products of 1 to 5 vectors with a matrix that instruction sets may decode in one pass with its products."""
    generator = np.random.default_rng(5)
    weights = generator.standard_normal((7, 1536), np.float32).astype(BF16)
    symbols, low = divide(LosslessKind("BF16"), weights)
    assert low is not None
    dense, sparse, sizes = _core.encode(code.program(), 0, symbols, blocks.rows, blocks.columns)
    spec = TensorSpec(7, 1536, "BF16", "lossless", code, blocks, LosslessKind("BF16"))
    streams = {layout.DENSE: dense, layout.SPARSE: sparse, layout.LOW: low.reshape(-1)}
    arrays = {suffix: layout.padded_stream([stream]) for suffix, stream in streams.items() if stream.size}
    matrix = open_matrix("a", spec, arrays | ({layout.SPARSE_SIZES: sizes} if sparse.size else {}))
    x = generator.standard_normal((5, 1536), np.float32)
    exact = x.astype(np.float64) @ weights.astype(np.float64).T
    found = [multiply([matrix], x[:count], _core.ThreadPool(1)) for count in range(1, 6)]
    bound = 1e-6 * np.abs(x).astype(np.float64) @ np.abs(weights.astype(np.float64)).T
    assert all((np.abs(y - exact[: len(y)]) < bound[: len(y)]).all() for y in found)
    return b"".join(y.tobytes() for y in found)


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("blocks", [Blocks(5, 1536), Blocks(3, 1024)])
def test_products_while_decoding_have_the_same_bits(
    bits: int, blocks: Blocks, instruction_sets: InstructionSets
) -> None:
    frequent = tuple(range(127, 127 - 2**bits + 1, -1))
    code = Code(Field(bits, frequent, Field(2, (128, 111, 112), Field(8, ()))))
    found = instruction_sets.each(_fused_bits, code, blocks)
    assert len(set(found.values())) == 1, list(found)


def test_a_damaged_list_is_found_while_decoding() -> None:
    weights = np.random.default_rng(6).standard_normal((4, 1024), np.float32).astype(BF16)
    spec, arrays = encode_words(weights, choose_lossless_code)
    assert arrays[layout.SPARSE].size
    arrays[layout.SPARSE][:2] ^= 1  # the length of the first list
    matrix = open_matrix("a", spec, arrays)
    with pytest.raises(CorruptStreamError, match="a: block 0 does not decode"):
        multiply([matrix], np.ones((1, 1024), np.float32), POOL)


def test_a_row_that_is_not_finite_does_not_spoil_others() -> None:
    matrix, weights = _open("words.weight")
    x = np.ones((1, weights.shape[1]), np.float32)
    clean = weights.astype(np.float32)
    is_finite = np.isfinite(clean).all(axis=1)
    found = multiply([matrix], x, POOL)[0]
    assert np.isnan(found[~is_finite]).all() or not np.isfinite(found[~is_finite]).all()
    assert not np.isfinite(found[~is_finite]).any()


def test_padded_columns_add_nothing() -> None:
    # The padding symbol is that of the most frequent exponent, here of infinities and NaNs.
    weights = np.full((2, 65), np.inf, np.float16)
    weights[1, :] = 1
    spec, arrays = encode_words(weights, choose_lossless_code)
    found = multiply([open_matrix("a", spec, arrays)], np.ones((1, 65), np.float32), POOL)
    assert found.tolist() == [[np.inf, 65.0]]
