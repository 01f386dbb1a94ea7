"""Version 2: one entry for a matrix, one table for a file, scales of a byte; and what is refused of each."""

from __future__ import annotations

import base64
import dataclasses
import zlib
from decimal import Decimal, localcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from entrollm import _core
from entrollm.errors import EntroLLMError, FormatError, UnsupportedError
from entrollm.format import layout
from entrollm.format.grid import OCTAVE_CODES, GridKind
from entrollm.format.log_scales import LogScales, decode_scales, snap
from entrollm.format.reader import CompressedModel
from entrollm.format.spec import TensorSpec
from entrollm.format.stored import store_matrix
from entrollm.format.writer import ShardWriter
from entrollm.matrix import matrix_of
from tests.support.folders import (
    BIAS,
    CONSTANT,
    MULTI_ROW,
    NORM,
    SPLIT_ROW,
    change_entries,
    change_header,
    change_spec,
    check_all,
    contents,
    example_plain,
    example_tensors,
    harmless_flips,
    read_entry,
    refuse,
    write_config,
    write_example,
)
from tests.support.paths import GOLDEN

CODES = np.array([0, 128, 255], np.uint8)


def coded_rows(spec: TensorSpec, arrays: dict[str, NDArray[Any]]) -> tuple[TensorSpec, dict[str, NDArray[Any]]]:
    """The matrix with scales per row and column, as codes."""
    columns = np.arange(spec.columns, dtype=np.uint8)
    spec = dataclasses.replace(spec, kind=GridKind(0.5, zero=127.75, stored={"scale": 8, "column_scale": 64}))
    arrays = {suffix: array for suffix, array in arrays.items() if suffix != layout.OFFSET}
    return spec, arrays | {layout.SCALE: CODES, layout.COLUMN_SCALE: columns}


def write_current(path: Path) -> Path:
    """The example folder in this version, with codes in place of its stored scales."""
    path.mkdir(parents=True, exist_ok=True)
    write_config(path, version=2)
    tensors = example_tensors()
    tensors[SPLIT_ROW] = coded_rows(*tensors[SPLIT_ROW])
    with ShardWriter(path / "model.safetensors") as writer:
        for name, tensor in tensors.items():
            writer.add_matrix(store_matrix(name, *tensor))
        for name, dtype in ((NORM, "BF16"), (BIAS, "F32")):
            writer.add_plain(name, dtype, example_plain()[name].shape, [example_plain()[name]])
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_current(tmp_path / "model")


def test_both_versions_hold_the_same(tmp_path: Path, folder: Path) -> None:
    found, expected = contents(folder), contents(write_example(tmp_path / "one"))
    assert {name: found[name] for name in found if name != SPLIT_ROW} == {
        name: expected[name] for name in expected if name != SPLIT_ROW
    }
    with CompressedModel.open(folder) as model:
        assert list(model.entries(MULTI_ROW)) == [layout.CODED]
        assert model.entries(CONSTANT) == {}
    check_all(folder)


def test_codes_mean_what_the_document_says(folder: Path) -> None:
    with CompressedModel.open(folder) as model:
        matrix = matrix_of(model, SPLIT_ROW)
        scale = [np.float32(2.0 ** ((int(code) - 128) / 8)) * np.float32(0.5) for code in CODES]
        np.testing.assert_array_equal(matrix.scale, scale)
        assert matrix.offset is not None and matrix.column_scale is not None
        np.testing.assert_array_equal(matrix.offset, np.array(scale, np.float32) * np.float32(-127.75))
        assert matrix.column_scale[[64, 128, 192]].tolist() == [0.5, 1, 2]


def test_a_written_file_is_aligned_and_no_larger_than_needed(file: Path) -> None:
    with CompressedModel.open(file.parent) as model:
        for name in (MULTI_ROW, SPLIT_ROW):
            stored = model.entries(name)[layout.CODED]
            assert stored.ctypes.data % 64 == 0 and stored.size % 64 == 0
            assert stored.size < sum(model.specs[name].parts or ()) + 64 + 128


def test_coded_entries_are_aligned_beside_group_scales(tmp_path: Path) -> None:
    """They are written at once, before the arrays beside them, however many matrices there are."""
    golden = GOLDEN / "v1-groups"
    write_config(tmp_path, version=2)
    with CompressedModel.open(golden) as model, ShardWriter(tmp_path / "model.safetensors") as writer:
        for name, spec in model.specs.items():
            writer.add_matrix(store_matrix(name, spec, model.entries(name)))
            assert writer.entries[-1].name == name + layout.CODED
    with CompressedModel.open(tmp_path) as model:
        for name in model.specs:
            assert model.entries(name)[layout.CODED].ctypes.data % 64 == 0
    assert contents(tmp_path) == contents(golden)


def test_coded_matrices_come_first(tmp_path: Path) -> None:
    spec, arrays = example_tensors()[MULTI_ROW]
    writer = ShardWriter(tmp_path / "model.safetensors")
    writer.add_plain(NORM, "BF16", (100,), [example_plain()[NORM]])
    with pytest.raises(ValueError, match=r"a.weight: coded matrices come before plain tensors"):
        writer.add_matrix(store_matrix(MULTI_ROW, spec, arrays))


def test_stored_bytes_foretell_the_file(tmp_path: Path) -> None:
    sizes, foretold = [], 0
    for count in (2, 40):
        path = tmp_path / f"{count}.safetensors"
        with ShardWriter(path) as writer:
            for index in range(count):
                spec, arrays = example_tensors()[MULTI_ROW]
                matrix = store_matrix(f"layers.{index}.weight", spec, arrays)
                if count == 40 and index >= 2:
                    foretold += writer.table.stored_bytes(matrix)
                writer.add_matrix(matrix)
        sizes.append(path.stat().st_size)
    assert abs(sizes[1] - sizes[0] - foretold) < 38 * 70


@pytest.mark.parametrize("per_octave", OCTAVE_CODES)
def test_fractions_of_an_octave_are_rounded_alike_everywhere(per_octave: int) -> None:
    """None is near the middle between two floats, where an exp2 of another library could round the other way."""
    with localcontext() as context:
        context.prec = 40
        for k in range(per_octave):
            exact = Decimal(2) ** (Decimal(k) / per_octave)
            place = exact * 2**23 % 1
            assert abs(place - Decimal("0.5")) > Decimal("1e-4")
            decoded = decode_scales(np.array([128 + k], np.uint8), per_octave, 1.0)[0]
            assert abs(Decimal(float(decoded)) - exact) * 2**23 <= Decimal("0.5")


@settings(deadline=None)
@given(st.lists(st.floats(1e-30, 1e30), min_size=1, max_size=50), st.sampled_from(OCTAVE_CODES))
def test_snapping_takes_the_nearest_that_a_byte_can_name(values: list[float], finest: int) -> None:
    scales = snap(np.array(values), finest)
    ratio = np.log2(scales.values().astype(np.float64) / values)
    assert scales.per_octave <= finest
    assert np.abs(ratio).max() <= 0.5 / scales.per_octave + 1e-3
    assert len(scales) == len(values) and isinstance(scales, LogScales)


def test_few_scales_are_no_spec_of_their_own(tmp_path: Path) -> None:
    """A stored scale for all rows, as version 1 allows it, moves to the spec."""
    spec, arrays = example_tensors()[SPLIT_ROW]
    arrays |= {layout.SCALE: np.array([0.5], np.float32), layout.OFFSET: np.array([2], np.float32)}
    with ShardWriter(tmp_path / "model.safetensors") as writer:
        matrix = store_matrix("w", spec, arrays)
        writer.add_matrix(matrix)
    assert matrix.spec.kind == GridKind(0.5, 2.0, stored={"column_scale": "F32"})


BAD_SPECS: dict[str, tuple[dict[str, Any], str]] = {
    "one part": ({"parts": [1]}, "parts must be three sizes in bytes"),
    "negative part": ({"parts": [-64, 10, 10]}, "parts must be three sizes in bytes"),
    "absurd part": ({"parts": [2**50, 0, 0]}, "parts must be three sizes in bytes"),
    "no parts": ({"parts": None, "scales": None}, "do not agree on whether it is one entry"),
    "scales alone": ({"parts": None}, "declares stored scales, but no parts that hold them"),
    "long side": ({"parts": [13824, 1, 4000]}, "its parts make"),
    "unknown scales": ({"scales": {"row_scale": 8}}, "scales must be of scale, offset, column_scale"),
    "list of scales": ({"scales": ["scale"]}, "scales must be of"),
    "odd octave": ({"scales": {"scale": 3}}, "scale is stored in an unknown form 3"),
    "true octave": ({"scales": {"scale": True}}, "scale is stored in an unknown form True"),
    "real octave": ({"scales": {"scale": 8.0}}, r"scale is stored in an unknown form 8\.0"),
    "list octave": ({"scales": {"scale": [8]}}, r"scale is stored in an unknown form \[8\]"),
    "coded offset": ({"scales": {"offset": 8}}, "offset is stored in an unknown form 8"),
    "other type": ({"scales": {"scale": "F16"}}, "scale is stored in an unknown form 'F16'"),
    "half offset": ({"scales": {"offset": "BF16"}}, "offset is stored in an unknown form 'BF16'"),
    "wider scales": ({"scales": {"scale": "F32", "column_scale": 64}}, "does not hold exactly"),
    "no scales": ({"scales": None}, "does not hold exactly"),
    "no base": ({"scale": None}, "stored as codes, and the spec has no scale that they multiply"),
    "absurd base": ({"scale": 3e38}, "its scale has a value that is not finite"),
    "more rows": ({"shape": [4, 4200]}, "b.weight"),
    "absurd zero": ({"scale": 5e33, "zero": 255}, "its zero gives an offset that is not finite"),
    "absurd rows": ({"shape": [2**27, 4200]}, "cannot hold"),
}


@pytest.mark.parametrize("case", BAD_SPECS)
def test_a_spec_that_does_not_fit_is_refused(folder: Path, file: Path, case: str) -> None:
    changes, message = BAD_SPECS[case]
    change_spec(file, SPLIT_ROW, **changes)
    refuse(folder, EntroLLMError, message)


def test_a_constant_matrix_has_nothing_behind_it(folder: Path, file: Path) -> None:
    change_spec(file, CONSTANT, parts=[0, 0, 5])
    change_entries(file, {CONSTANT + ".coded": ("U8", np.zeros(128, np.uint8))})
    refuse(folder, FormatError, "5 bytes follow its streams, which its spec does not declare")


def test_entries_of_version_1_are_refused(folder: Path, file: Path) -> None:
    change_entries(file, {MULTI_ROW + ".sparse_sizes": ("U16", np.ones(1, np.uint16))})
    refuse(folder, FormatError, "'a.weight.sparse_sizes' belongs to no tensor that the header describes")


def test_version_1_has_no_coded_entries(tmp_path: Path) -> None:
    folder = write_example(tmp_path / "one")
    file = folder / "model.safetensors"
    change_entries(file, {MULTI_ROW + ".coded": ("U8", np.zeros(128, np.uint8))})
    refuse(folder, FormatError, "'a.weight.coded' belongs to no tensor that the header describes")
    change_spec(write_example(tmp_path / "two") / "model.safetensors", MULTI_ROW, parts=[0, 0, 0])
    refuse(tmp_path / "two", FormatError, "a.weight: its spec has parts, which format version 1 does not have")


@pytest.mark.parametrize("change", [-64, 64])
def test_an_entry_of_another_size_is_refused(folder: Path, file: Path, change: int) -> None:
    entry = read_entry(file, MULTI_ROW + ".coded", np.uint8)
    change_entries(file, {MULTI_ROW + ".coded": ("U8", np.resize(entry, entry.size + change))})
    refuse(folder, FormatError, f"the entry coded has {entry.size + change} bytes, its parts make {entry.size}")


def deflated(text: bytes) -> str:
    return base64.b64encode(zlib.compress(text)).decode()


BAD_TABLES: dict[str, tuple[dict[str, Any], str]] = {
    "no table": ({"entrollm.tensors": None}, "its header has no 'entrollm.tensors'"),
    "no base64": ({"entrollm.tensors": "%"}, "entrollm.tensors is not deflated base64"),
    "not deflated": ({"entrollm.tensors": "AAAA"}, "entrollm.tensors is not deflated base64"),
    "cut": ({"entrollm.tensors": deflated(b"{}" * 99)[:8]}, "is not one deflated stream of at most"),
    "more": ({"entrollm.tensors": base64.b64encode(zlib.compress(b"{}") + b"x").decode()}, "is not one deflated"),
    "no JSON": ({"entrollm.tensors": deflated(b"{")}, "entrollm.tensors is not valid JSON"),
    "half": ({"entrollm.tensors": deflated(b'{"coded":{}}')}, "must hold the objects 'coded' and 'plain'"),
    "list": ({"entrollm.tensors": deflated(b'{"coded":[],"plain":{}}')}, "must hold the objects"),
    "twice": ({"entrollm.tensors": deflated(b'{"coded":{},"coded":{},"plain":{}}')}, "has the key 'coded' twice"),
    "number": ({"entrollm.tensors": deflated(b'{"coded":{"a":1},"plain":{}}')}, "the spec of 'a' must be a string"),
    "bad checksum": ({"entrollm.tensors": deflated(b'{"coded":{},"plain":{"a":"0"}}')}, "must be 8 hex digits"),
    "nothing": ({"entrollm.tensors": deflated(b'{"coded":{},"plain":{}}')}, "belongs to no tensor that the header"),
    "bomb": (
        {"entrollm.tensors": deflated(b'{"coded":{' + b" " * 2**23 + b'},"plain":{}}')},
        "is not one deflated stream",
    ),
    "many": (
        {"entrollm.tensors": deflated(b'{"coded":{},"plain":{' + b'"":"",' * 50000 + b'"":""}}')},
        "lists far more than the file's",
    ),
    "something else": ({"author": "me"}, "its header has the unknown key 'author'"),
}


@pytest.mark.parametrize("case", BAD_TABLES)
def test_a_bad_table_is_refused(folder: Path, file: Path, case: str) -> None:
    changes, message = BAD_TABLES[case]

    def change(header: dict[str, Any]) -> None:
        metadata = header["__metadata__"] | changes
        header["__metadata__"] = {key: value for key, value in metadata.items() if value is not None}

    change_header(file, change)
    refuse(folder, FormatError, message)


def test_a_newer_version_is_refused(folder: Path, file: Path) -> None:
    change_header(file, lambda header: header["__metadata__"].update({"entrollm.version": "3"}))
    refuse(folder, UnsupportedError, "format version '3'; this EntroLLM reads 1 and 2")


def test_a_flipped_bit_anywhere_is_refused_or_harmless(folder: Path, file: Path) -> None:
    content = file.read_bytes()
    generator = np.random.default_rng(8)
    header_bytes = 8 + int.from_bytes(content[:8], "little")
    data = generator.choice(np.arange(header_bytes, len(content)), 150, replace=False)
    harmless = harmless_flips(folder, file, [*range(header_bytes), *data.tolist()], generator)
    assert harmless <= 30  # "pt", white space, unused bits of base64


def test_noise_in_an_entry_never_crashes(folder: Path, file: Path) -> None:
    generator = np.random.default_rng(9)
    entry = read_entry(file, SPLIT_ROW + ".coded", np.uint8)
    dense, sparse, _ = CompressedModel.open(folder).specs[SPLIT_ROW].parts or (0, 0, 0)
    refused = 0
    for _ in range(60):
        noisy = entry.copy()
        begin = int(generator.choice([0, dense, dense + sparse]))
        noisy[begin:] = generator.integers(0, 256, entry.size - begin, np.uint8)
        write_current(folder)
        change_entries(file, {SPLIT_ROW + ".coded": ("U8", noisy)})
        try:
            contents(folder)
        except EntroLLMError as error:
            assert str(error).startswith(SPLIT_ROW)
            refused += 1
    assert refused == 60


def test_decoding_runs_over_the_entry_alone(folder: Path) -> None:
    """Wide loads stay in the entry: both streams have room behind them, whatever follows in the file."""
    with CompressedModel.open(folder) as model:
        for name in (MULTI_ROW, SPLIT_ROW):
            spec, coded = model.specs[name], model.entries(name)[layout.CODED]
            dense, sparse, side = spec.parts or (0, 0, 0)
            assert coded.size >= dense + layout.padded_size(sparse)
            assert coded.size >= dense + sparse + side
            matrix_of(model, name).symbols(0, spec.rows, _core.ThreadPool(1))


def test_version_1_has_no_codes(tmp_path: Path) -> None:
    """An entry of version 1, which has no codes, with a spec that tells of some."""
    folder = write_example(tmp_path / "one")
    change_spec(folder / "model.safetensors", SPLIT_ROW, scales={"scale": 8}, scale=0.5)
    refuse(folder, FormatError, "b.weight: its spec declares stored scales, but no parts that hold them")
