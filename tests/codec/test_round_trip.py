"""decode(encode(x)) == x for any code, shape and blocks: reference, native encoder, every instruction set."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from entrollm import _core
from entrollm.codec import reference
from entrollm.codec.blocks import choose_blocks
from entrollm.errors import CorruptStreamError
from entrollm.format.blocks import Blocks, block_count, padded
from entrollm.format.code import MAX_DEPTH, MAX_NODES, Code, Field, Leaf, Node, Split
from tests.support.isa_workers import InstructionSets
from tests.support.matrices import block_shapes, codes, decode, dequantize, encodable, shapes, store, symbol_matrices

quick = settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
shared = settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@quick
@given(st.data())
def test_the_reference_decodes_what_it_encodes(data: st.DataObject) -> None:
    code = data.draw(codes())
    rows, columns = data.draw(shapes(2000))
    blocks = data.draw(block_shapes(rows, columns))
    symbols = data.draw(symbol_matrices(code, (rows, columns))).tolist()
    dense, sparse, sizes = reference.encode_matrix(code, symbols, blocks)
    assert len(sizes) == block_count(rows, columns, blocks)
    assert reference.decode_matrix(code, (rows, columns), blocks, dense, sparse, sizes) == symbols


def _encode(code: Code, symbols: NDArray[np.uint8], blocks: Blocks) -> tuple[bytes, bytes, list[int]]:
    dense, sparse, sizes = _core.encode(code.program(), code.low_bits, symbols, blocks.rows, blocks.columns)
    return dense.tobytes(), sparse.tobytes(), sizes.tolist()


@quick
@given(st.data())
def test_every_instruction_set_writes_the_reference_bytes(
    instruction_sets: InstructionSets, data: st.DataObject
) -> None:
    code = data.draw(codes())
    rows, columns = data.draw(shapes(2000))
    blocks = data.draw(block_shapes(rows, columns))
    symbols = data.draw(symbol_matrices(code, (rows, columns)))
    expected = reference.encode_matrix(code, symbols.tolist(), blocks)
    for name, encoded in instruction_sets.each(_encode, code, symbols, blocks).items():
        assert encoded == expected, name


@shared
@given(st.data())
def test_every_instruction_set_decodes_what_was_encoded(instruction_sets: InstructionSets, data: st.DataObject) -> None:
    code = data.draw(codes())
    shape = data.draw(shapes(60_000))
    symbols = data.draw(symbol_matrices(code, shape))
    stored = store(code, symbols, data.draw(block_shapes(*shape)))
    for name, decoded in instruction_sets.each(decode, stored, data.draw(st.sampled_from([1, 3]))).items():
        np.testing.assert_array_equal(decoded, symbols, err_msg=name)


@shared
@given(st.data())
def test_a_range_of_rows_is_that_part_of_the_whole(data: st.DataObject) -> None:
    code = data.draw(codes())
    rows, columns = data.draw(shapes(30_000))
    symbols = data.draw(symbol_matrices(code, (rows, columns)))
    matrix = store(code, symbols, data.draw(block_shapes(rows, columns))).open()
    begin, end = sorted([data.draw(st.integers(0, rows)), data.draw(st.integers(0, rows))])
    np.testing.assert_array_equal(matrix.decode(begin, end, _core.ThreadPool(2)), symbols[begin:end])


@shared
@given(st.data())
def test_rows_dequantize_to_product_plus_offset_in_float32(
    instruction_sets: InstructionSets, data: st.DataObject
) -> None:
    code = data.draw(codes())
    rows, columns = data.draw(shapes(30_000))
    symbols = data.draw(symbol_matrices(code, (rows, columns)))
    generator = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    scales = rows if data.draw(st.booleans()) else 1
    scale = generator.standard_normal(scales).astype(np.float32)
    offset = generator.standard_normal(scales).astype(np.float32) if data.draw(st.booleans()) else None
    column_scale = generator.standard_normal(columns).astype(np.float32) if data.draw(st.booleans()) else None
    stored = store(code, symbols, data.draw(block_shapes(rows, columns)), scale, offset, column_scale)
    picked = generator.integers(0, rows, data.draw(st.integers(0, 200)))
    expected = symbols.astype(np.float32) * scale[:, None]
    if offset is not None:
        expected = expected + offset[:, None]
    if column_scale is not None:
        expected = expected * column_scale
    assert expected.dtype == np.float32
    for name, values in instruction_sets.each(dequantize, stored, picked, 2).items():
        np.testing.assert_array_equal(values.view(np.uint32), expected[picked].view(np.uint32), err_msg=name)


@pytest.mark.parametrize("columns", [1, 63, 64, 65, 384, 576, 960, 2048, 4096, 4097, 5000, 14336])
@pytest.mark.parametrize("rows", [1, 7, 40])
def test_every_shape_of_the_models_survives(instruction_sets: InstructionSets, rows: int, columns: int) -> None:
    code = Code(Field(2, (8, 12, 4), Field(3, (16, 0, 20, 24, 28, 32, 36), Field(8, ()))), low_bits=2)
    symbols = np.random.default_rng(rows * columns).integers(0, 60, (rows, columns), np.uint8)
    for name, decoded in instruction_sets.each(decode, store(code, symbols)).items():
        np.testing.assert_array_equal(decoded, symbols, err_msg=name)


def _chain(depth: int) -> Node:
    node: Node = Field(1, (depth, depth + 1))
    for level in reversed(range(depth)):
        node = Field(1, (level,), node)
    return node


def _comb(splits: int) -> Node:
    """A tree with 2 * splits + 1 nodes, balanced so that it stays shallow."""
    if splits == 0:
        return Field(1, (1, 2))
    return Split(_comb((splits - 1) // 2), _comb(splits - 1 - (splits - 1) // 2))


def test_the_deepest_tree_round_trips(instruction_sets: InstructionSets) -> None:
    code = Code(_chain(MAX_DEPTH))
    lengths = np.array([reference.code_bits(code.tree, s) for s in range(MAX_DEPTH + 2)])
    assert lengths.max() == MAX_DEPTH + 1
    weights = 2.0 ** -np.minimum(lengths, 8)
    symbols = np.random.default_rng(1).choice(MAX_DEPTH + 2, (3, 300), p=weights / weights.sum()).astype(np.uint8)
    symbols[1] = MAX_DEPTH + 1  # only longest codes
    expected = reference.encode_matrix(code, symbols.tolist(), choose_blocks(3, 300))
    stored = store(code, symbols)
    assert stored.sparse.tobytes().startswith(expected[1])
    for name, decoded in instruction_sets.each(decode, stored).items():
        np.testing.assert_array_equal(decoded, symbols, err_msg=name)


def test_the_largest_tree_round_trips(instruction_sets: InstructionSets) -> None:
    code = Code(_comb((MAX_NODES - 1) // 2))
    symbols = np.random.default_rng(2).choice(np.array([1, 2], np.uint8), (2, 500))
    for name, decoded in instruction_sets.each(decode, store(code, symbols)).items():
        np.testing.assert_array_equal(decoded, symbols, err_msg=name)


def test_a_tree_beyond_a_limit_is_refused() -> None:
    symbols = np.zeros((1, 64), np.uint8)
    for tree, message in ((_chain(MAX_DEPTH + 1), "too deep"), (_comb(MAX_NODES // 2 + 1), "too many nodes")):
        with pytest.raises(ValueError, match=message):
            _core.encode(Code(tree).program(), 0, symbols, 1, 64)


def test_a_one_symbol_matrix_takes_no_bytes(instruction_sets: InstructionSets) -> None:
    symbols = np.full((5, 70), 9, np.uint8)
    stored = store(Code(Leaf(9)), symbols)
    assert (stored.dense.size, stored.sparse.size, stored.sizes.size) == (0, 0, 0)
    for name, decoded in instruction_sets.each(decode, stored).items():
        np.testing.assert_array_equal(decoded, symbols, err_msg=name)


def test_the_shortest_code_pads_rows() -> None:
    code = Code(Field(1, (3,), Field(1, (1, 2))))
    assert reference.padding_symbol(code) == 3
    dense, sparse, sizes = _core.encode(code.program(), 0, np.full((1, 1), 3, np.uint8), 1, 64)
    assert (dense.tobytes(), sparse.tobytes(), sizes.tolist()) == (bytes(8), bytes(2), [2])


@pytest.mark.parametrize("symbol", [5, 255])
def test_a_symbol_outside_the_code_is_refused(symbol: int) -> None:
    code = Code(Field(1, (3,), Field(1, (1, 2))))
    with pytest.raises(ValueError, match="a symbol is not in the code"):
        _core.encode(code.program(), 0, np.full((1, 3), symbol, np.uint8), 1, 64)
    with pytest.raises(ValueError, match=f"symbol {symbol} is not in the code"):
        reference.encode_block(code, [symbol] * 64)


def test_lists_longer_than_their_size_field_are_refused() -> None:
    node: Node = Field(8, ())
    for _ in range(12):
        node = Field(6, tuple(range(63)), node)
    with pytest.raises(ValueError, match="the code is too long for its blocks"):
        _core.encode(Code(node).program(), 0, np.full((2, 4096), 200, np.uint8), 2, 4096)


@quick
@given(st.data())
def test_the_reference_and_the_kernels_refuse_the_same_streams(data: st.DataObject) -> None:
    """Flip one byte of a stream: both decode to the same symbols, or both refuse."""
    code = data.draw(codes())
    rows, columns = data.draw(shapes(500))
    blocks = data.draw(block_shapes(rows, columns))
    stored = store(code, data.draw(symbol_matrices(code, (rows, columns))), blocks)
    streams = [stream for stream in (stored.dense, stored.sparse) if stream.size]
    if streams:
        stream = data.draw(st.sampled_from(streams))
        stream[data.draw(st.integers(0, stream.size - _core.SLACK_BYTES))] ^= data.draw(st.integers(1, 255))
    args = (stored.dense.tobytes(), stored.sparse.tobytes(), stored.sizes.tolist())
    try:
        expected = np.array(reference.decode_matrix(code, (rows, columns), blocks, *args))
    except CorruptStreamError:
        with pytest.raises(_core.CorruptBlockError, match=r"block \d+ does not decode to its stated length"):
            decode(stored)
    else:
        np.testing.assert_array_equal(decode(stored), expected)


def test_the_reference_names_what_is_wrong_with_a_block() -> None:
    code = Code(Field(1, (3,), Field(1, (1, 2))))
    dense, sparse = reference.encode_block(code, [3, 1, 2, 3] * 16)
    cases = {
        "a list of 200 symbols in a block of 64": b"\xc8" + sparse[1:],
        "sparse part ends early": sparse[:-1],
        r"the block has 7 sparse bytes, its lists 6": sparse + b"\x00",
        r"does not match its \[32\] escapes": b"\x1f" + sparse[1:],
    }
    for message, changed in cases.items():
        with pytest.raises(CorruptStreamError, match=message):
            reference.decode_block(code, dense, changed, 64)


@given(st.integers(1, 5000), st.integers(1, 20_000))
def test_chosen_blocks_are_valid(rows: int, columns: int) -> None:
    blocks = choose_blocks(rows, columns)
    geometry = _core.Geometry(rows, columns, blocks.rows, blocks.columns)  # raises when they are not
    assert geometry.blocks == block_count(rows, columns, blocks)
    # The last block of a row is shorter by less than a group for each part.
    parts = -(-padded(columns) // blocks.columns)
    assert parts * blocks.columns < padded(columns) + 512 * parts


def test_encodable_symbols_are_those_that_encode() -> None:
    code = Code(Split(Field(1, (4, 8)), Field(1, (12, 16))), low_bits=1)
    assert encodable(code).tolist() == [4, 5, 8, 9, 12, 13, 16, 17]


BAD_GEOMETRIES = {
    "no rows": ((0, 5, 1, 64), "matrix sizes must be between"),
    "many rows": ((2**31 + 1, 5, 1, 64), "matrix sizes must be between"),
    "many weights": ((2**31, 1024, 1, 64), r"more than 2\^40 weights"),
    "no block rows": ((5, 64, 0, 64), "block sizes are out of range"),
    "part of a vector": ((5, 64, 1, 32), "block sizes are out of range"),
    "wide block": ((5, 8192, 1, 8192), "block sizes are out of range"),
    "large block": ((500, 64, 129, 64), "block sizes are out of range"),
    "wider than the row": ((5, 64, 1, 128), "block columns do not fit the matrix"),
}


@pytest.mark.parametrize("case", BAD_GEOMETRIES)
def test_blocks_that_do_not_fit_are_refused(case: str) -> None:
    sizes, message = BAD_GEOMETRIES[case]
    with pytest.raises(ValueError, match=message):
        _core.Geometry(*sizes)


def test_one_row_blocks_hold_no_second_row() -> None:
    assert _core.Geometry(4, 100, 1, 64).blocks == 8
    assert block_count(4, 100, Blocks(1, 64)) == 8
