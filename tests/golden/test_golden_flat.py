"""The file of flat codes, byte for byte: native code and the reference read and write it alike."""

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
from tests.support.golden_flat import CASES, SEGMENT_ROWS, write_golden_flat

FLAT = Path(__file__).parent / "v2-flat"
SHA256 = "24b4869178a0fc1d43d56f66720ae084f9de0105c96c7f11ffe6527cfbb175e7"
# 8200 columns on, one step down; one column on, 8 up; 798 columns on, 132 up.
WIDE_WORDS = [4095, 4095, 10 | 15 << 12, 1 | 7 << 12, 1 << 12, 798 | 7 << 12, *[7 << 12] * 17, 6 << 12]


def test_the_file_is_untouched() -> None:
    assert hashlib.sha256((FLAT / "model.safetensors").read_bytes()).hexdigest() == SHA256


@pytest.mark.parametrize("name", CASES)
def test_the_integers_are_as_stated(name: str, tmp_path: Path) -> None:
    # Deflate may give other bytes elsewhere, so what is written now is read back and not compared.
    write_golden_flat(tmp_path)
    symbols, windows = CASES[name]
    for folder in (FLAT, tmp_path):
        with CompressedModel.open(folder) as model:
            model.check_checksum(name + ".weight")
            matrix = matrix_of(model, name + ".weight")
            stored = model.matrix_arrays(name + ".weight")
            rows = np.arange(len(symbols))
            np.testing.assert_array_equal(matrix.symbols(0, len(rows), _core.ThreadPool(1)), symbols)
            values = matrix.dequantize(rows, _core.ThreadPool(1))
            np.testing.assert_array_equal(values, symbols * np.float32(0.125) + np.float32(-0.3125))
            streams = [stored[s].tobytes() if s in stored else b"" for s in layout.STREAMS]
            sizes = stored[layout.SPARSE_SIZES].tolist() if layout.SPARSE_SIZES in stored else []
            assert [(word & 255, word >> 8) for word in stored[layout.SEGMENTS].tolist()] == windows
        assert reference.decode_flat(symbols.shape, SEGMENT_ROWS, windows, *streams, sizes) == symbols.tolist()
        fields, patches, _ = reference.encode_flat(symbols.tolist(), SEGMENT_ROWS, windows)
        assert streams[0].startswith(fields) and streams[1].startswith(patches)


def test_some_patches_are_written_out() -> None:
    symbols, windows = CASES["wide"]
    _, patches, sizes = reference.encode_flat(symbols.tolist(), SEGMENT_ROWS, windows)
    assert sizes == [len(patches)]
    assert np.frombuffer(patches, "<u2").tolist() == WIDE_WORDS
