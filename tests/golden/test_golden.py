"""Files of each format version, byte for byte: what was readable stays readable, and is written the same."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest

from entrollm import _core
from entrollm.codec import reference
from entrollm.format import layout
from entrollm.format.reader import CompressedModel
from entrollm.matrix import matrix_of
from tests.support.golden_cases import GOLDEN, golden_codes, golden_scales, write_golden

V1, V2 = (Path(__file__).parent / version for version in ("v1", "v2"))
SHA256_V2 = "6c5d96d69512eb02c59a1950112ba43e48e5811267d179f1612cd4d8fe82d773"
SHA256 = {
    "config.json": "f8b6518a567b7500e215edcae2d9aa392bff94caaad71c715f71c826e549495e",
    "model.safetensors": "f75ec2ac078bb9cfcf49edc3f8d992ef3e65349d286119f916f199418c9f9eed",
}


@pytest.mark.parametrize("name", SHA256)
def test_the_files_are_untouched(name: str) -> None:
    assert hashlib.sha256((V1 / name).read_bytes()).hexdigest() == SHA256[name]


def test_the_same_integers_still_give_the_same_bytes(tmp_path: Path) -> None:
    write_golden(tmp_path)
    for name, expected in SHA256.items():
        assert hashlib.sha256((tmp_path / name).read_bytes()).hexdigest() == expected


def test_the_file_of_version_2_is_untouched() -> None:
    assert hashlib.sha256((V2 / "model.safetensors").read_bytes()).hexdigest() == SHA256_V2


def test_what_is_written_reads_like_version_2(tmp_path: Path) -> None:
    """Deflate may give other bytes elsewhere, so what is written now is read back and not compared."""
    write_golden(tmp_path, 2)
    with CompressedModel.open(V2) as golden, CompressedModel.open(tmp_path) as model:
        assert golden.plain == model.plain and list(golden.specs) == list(model.specs)
        for name in golden.specs:
            stored, written = golden.matrix_arrays(name), model.matrix_arrays(name)
            assert stored.keys() == written.keys()
            for suffix in stored.keys() - set(layout.STREAMS):
                np.testing.assert_array_equal(stored[suffix], written[suffix])


@pytest.mark.parametrize("name", GOLDEN)
@pytest.mark.parametrize("folder", [V1, V2], ids=["v1", "v2"])
def test_the_integers_are_as_stated(name: str, folder: Path) -> None:
    golden = GOLDEN[name]
    symbols = golden.symbols()
    with CompressedModel.open(folder) as model:
        model.check_checksum(name + ".weight")
        matrix = matrix_of(model, name + ".weight")
        assert matrix.spec.code == golden.code
        decoded = matrix.symbols(0, golden.shape[0], _core.ThreadPool(1))
        np.testing.assert_array_equal(decoded, symbols)
        stored = model.matrix_arrays(name + ".weight")
        streams = [stored[s].tobytes() if s in stored else b"" for s in layout.STREAMS]
        sizes = stored[layout.SPARSE_SIZES].tolist() if layout.SPARSE_SIZES in stored else []
    assert reference.decode_matrix(golden.code, golden.shape, golden.blocks, *streams, sizes) == symbols.tolist()
    dense, sparse, _ = reference.encode_matrix(golden.code, symbols.tolist(), golden.blocks)
    assert streams[0].startswith(dense) and streams[1].startswith(sparse)


def test_some_integers_are_written_out() -> None:
    """Against a change of the generator itself."""
    assert GOLDEN["cascade"].symbols()[0, :12].tolist() == [13, 8, 17, 0, 9, 74, 6, 39, 4, 7, 1, 2]
    assert GOLDEN["pivot"].symbols()[1, -12:].tolist() == [32, 53, 1, 1, 40, 2, 42, 30, 3, 2, 2, 1]


def test_codes_of_scales_are_as_stated() -> None:
    with CompressedModel.open(V2) as model:
        values = matrix_of(model, "rows.weight").dequantize(np.arange(7), _core.ThreadPool(1))
    codes = golden_codes()
    scale = np.float32(0.125) * (2.0 ** ((codes[layout.SCALE].astype(int) - 128) / 16)).astype(np.float32)
    columns = (2.0 ** ((codes[layout.COLUMN_SCALE].astype(int) - 128) / 64)).astype(np.float32)
    offset = scale * np.float32(-7.25)
    symbols = GOLDEN["rows"].symbols().astype(np.float32)
    np.testing.assert_array_equal(values, (symbols * scale[:, None] + offset[:, None]) * columns)


@pytest.mark.parametrize("folder", [V1, V2], ids=["v1", "v2"])
def test_scales_and_plain_tensors_are_as_stated(folder: Path) -> None:
    with CompressedModel.open(folder) as model:
        symbols = GOLDEN["rows.parts"].symbols().astype(np.float32)
        scales = golden_scales()
        expected = (symbols * scales[layout.SCALE][:, None] + scales[layout.OFFSET][:, None]) * scales[
            layout.COLUMN_SCALE
        ]
        pool = _core.ThreadPool(1)
        np.testing.assert_array_equal(matrix_of(model, "rows.parts.weight").dequantize(np.arange(5), pool), expected)
        flat = matrix_of(model, "flat3.weight").dequantize(np.arange(3), pool)
        np.testing.assert_array_equal(flat, GOLDEN["flat3"].symbols().astype(np.float32) * 0.125 - 0.5)
        assert model.array("norm.weight").tolist() == [1, 0.5, -2, 0]
        assert model.array("scalar") == 3
        model.check_checksum("norm.weight")
