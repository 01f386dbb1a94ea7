"""Flat codes in files: round trips, what the parser refuses, and products on every instruction set."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from entrollm import _core
from entrollm.codec import reference
from entrollm.codec.flat import Window, best_window
from entrollm.errors import CorruptStreamError, FormatError
from entrollm.format import layout
from entrollm.format.code import Code, Field
from entrollm.format.entry import split_entries
from entrollm.format.flat import FlatCode
from entrollm.format.grid import GridKind
from entrollm.format.spec import TensorSpec
from entrollm.format.stored import StoredMatrix, store_matrix
from entrollm.matrix import CodedMatrix, multiply, open_matrix
from tests.codec.test_multiply import activations
from tests.support.golden_flat import golden_matrix
from tests.support.isa_workers import InstructionSets
from tests.support.matrices import store

POOL = _core.ThreadPool(2)
ANY = np.zeros(0, np.uint16)


@st.composite
def matrices(draw: st.DrawFn) -> tuple[NDArray[np.uint8], int]:
    """Symbols that crowd, with strays, and rows of a segment."""
    rows, columns = draw(st.integers(1, 9)), draw(st.sampled_from([1, 63, 64, 130, 4200]))
    generator = np.random.default_rng(draw(st.integers(0, 2**32)))
    size = 2 ** draw(st.integers(1, 8))
    symbols = generator.integers(0, size, (rows, columns)) + draw(st.integers(0, 256 - size))
    strays = generator.random((rows, columns)) < draw(st.sampled_from([0, 0.01, 0.5]))
    symbols[strays] = generator.integers(0, 256, int(strays.sum()))
    return symbols.astype(np.uint8), draw(st.integers(1, 5))


@settings(max_examples=60, deadline=None)
@given(matrices())
def test_native_code_and_the_reference_agree(case: tuple[NDArray[np.uint8], int]) -> None:
    symbols, segment_rows = case
    fields, patches, sizes, words = _core.encode_flat(symbols, segment_rows, ANY)
    windows = [(word & 255, word >> 8) for word in words.tolist()]
    expected = reference.encode_flat(symbols.tolist(), segment_rows, windows)
    assert (fields.tobytes(), patches.tobytes(), sizes.tolist()) == expected
    assert reference.decode_flat(symbols.shape, segment_rows, windows, *expected) == symbols.tolist()
    matrix = open_stored(symbols, segment_rows)
    np.testing.assert_array_equal(matrix.symbols(0, len(symbols), POOL), symbols)


def open_stored(symbols: NDArray[np.uint8], segment_rows: int) -> CodedMatrix:
    stored = stored_flat(symbols, segment_rows)
    return open_matrix(stored.name, stored.spec, stored.entries)


def stored_flat(symbols: NDArray[np.uint8], segment_rows: int) -> StoredMatrix:
    fields, patches, sizes, windows = _core.encode_flat(symbols, segment_rows, ANY)
    code = FlatCode(segment_rows)
    spec = TensorSpec(*symbols.shape, "F32", "test", code, code.blocks(symbols.shape[1]), GridKind(scale=0.5))
    arrays = {
        layout.DENSE: layout.padded_stream([fields]),
        layout.SPARSE: layout.padded_stream([patches.view(np.uint8)]),
        layout.SPARSE_SIZES: sizes if patches.size else ANY,
        layout.SEGMENTS: windows,
    }
    return store_matrix("w", spec, arrays)


def products(symbols: NDArray[np.uint8], xs: list[NDArray[np.float32]]) -> list[tuple[NDArray, NDArray]]:
    """The products of a flat matrix in a file and of a coded one."""
    flat = open_stored(symbols, 64)
    coded = store(Code(Field(8, ())), symbols, scale=[0.5]).open()
    return [(multiply([flat], x, POOL), coded.multiply(x, POOL)) for x in xs]


@pytest.mark.parametrize("columns", [70, 4160])
def test_products_have_the_same_bits_on_every_instruction_set(instruction_sets: InstructionSets, columns: int) -> None:
    generator = np.random.default_rng(columns)
    symbols = np.clip(np.rint(generator.normal(90, 3, (70, columns))), 0, 255).astype(np.uint8)
    symbols[generator.random(symbols.shape) < 0.003] = 250
    for results in instruction_sets.each(products, symbols, [activations((b, columns), b) for b in (1, 3, 9)]).values():
        for flat, coded in results:
            np.testing.assert_array_equal(flat.view(np.uint32), coded.view(np.uint32))


def test_the_file_form_is_used_in_place_or_copied() -> None:
    symbols = np.full((3, 4160), 7, np.uint8)
    symbols[1, 5:4000:1000] = 200
    matrix = open_stored(symbols, 2)
    assert matrix.can_be_flat and not matrix.is_flat and matrix.flat_bytes is None
    copy = matrix.to_flat(POOL)
    assert copy.is_flat and copy.to_flat(POOL) is copy
    assert copy.flat_bytes is not None and 3 * 4160 / 4 < copy.flat_bytes < 3 * 4160 / 4 + 1000
    x = activations((2, 4160), 1)
    expected = multiply([matrix], x, POOL)
    del matrix
    assert copy.flat_rows == {2: 3}
    np.testing.assert_array_equal(copy.symbols(0, 3, POOL), symbols)
    np.testing.assert_array_equal(multiply([copy], x, POOL), expected)


def test_an_entry_at_an_odd_address_is_read() -> None:
    stored = golden_matrix("widths")
    coded = stored.entries[layout.CODED]
    room = np.zeros(coded.size + 1, np.uint8)
    room[1:] = coded
    found = open_matrix("w", stored.spec, {layout.CODED: room[1:]}).symbols(0, 14, POOL)
    np.testing.assert_array_equal(found, open_matrix("w", stored.spec, stored.entries).symbols(0, 14, POOL))


@pytest.mark.parametrize(
    ("suffix", "change", "message"),
    [
        (layout.SEGMENTS, lambda a: np.where(np.arange(a.size) == 2, 9, a), "segment 2 has fields of 9 bits"),
        (layout.SEGMENTS, lambda a: np.where(np.arange(a.size) == 0, 3 | 250 << 8, a), "from symbol 250 on"),
        (layout.SEGMENTS, lambda a: np.where(np.arange(a.size) == 0, 8, a), "the field stream has"),
        (layout.SPARSE_SIZES, lambda a: a + 1, "half a patch"),
        (layout.SPARSE, lambda a: np.full_like(a, 255), "a row of 100 columns has a patch in column"),
    ],
)
def test_what_would_leave_the_matrix_is_refused(suffix: str, change, message: str) -> None:
    stored = golden_matrix("widths")
    arrays = split_entries("w", stored.spec, stored.entries)
    arrays[suffix] = change(arrays[suffix]).astype(arrays[suffix].dtype)
    if suffix == layout.SPARSE_SIZES:  # the stream stays as long as its sizes say
        arrays[layout.SPARSE] = layout.padded_stream([np.zeros(int(arrays[suffix].sum()), np.uint8)])
    damaged = store_matrix("w", dataclasses.replace(stored.spec, parts=None), arrays)
    with pytest.raises(FormatError, match=message):
        open_matrix("w", damaged.spec, damaged.entries)


def test_the_reference_refuses_a_patch_outside_of_its_row() -> None:
    with pytest.raises(CorruptStreamError, match="row 0 of 10 columns has a patch in column 10"):
        reference.decode_flat((1, 10), 1, [(2, 0)], bytes(16), (10 | 1 << 12).to_bytes(2, "little"), [2])


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('{"flat":2}', '{"flat":0}', "1 to 8192 rows in a segment"),
        ('{"flat":2}', '{"flat":2,"bits":3}', "1 to 8192 rows in a segment"),
        ('"error"', '"block":[2,128],"error"', "a flat code has no block"),
        ('"error"', '"low_bits":1,"error"', "a flat code has no low_bits"),
        ('"parts":[1152,408,33],', "", "a flat code needs parts"),
        (
            '"scale":0.125,"zero":2.5',
            '"groups":{"size":4,"types":{"group_scale":"F16"}}',
            "a flat code has no group scales",
        ),
    ],
)
def test_a_malformed_spec_is_refused(old: str, new: str, message: str) -> None:
    text = golden_matrix("widths").spec_text
    assert old in text
    with pytest.raises(FormatError, match=message):
        TensorSpec.from_json(text.replace(old, new), "w")


def test_the_predicted_bits_are_the_stored_ones() -> None:
    generator = np.random.default_rng(3)
    symbols = np.clip(np.rint(generator.normal(128, 2.1, (64, 512))), 0, 255).astype(np.uint8)
    window, bits = best_window(np.bincount(symbols.reshape(-1), minlength=256).tolist())
    fields, patches, _, words = _core.encode_flat(symbols, 64, ANY)
    assert words.tolist() == [window.bits | window.base << 8]
    assert bits == 8 * (fields.nbytes + patches.nbytes)
    assert Window(2, 100).lengths()[[92, 91, 100, 103, 110, 111]].tolist() == [18, 34, 2, 2, 18, 34]
