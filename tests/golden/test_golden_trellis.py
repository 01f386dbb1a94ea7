"""The file of matrices with a trellis: what native code, torch and the reference make of it."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest

from entrollm import _core
from entrollm.codec import reference
from entrollm.compress.verify import verify
from entrollm.format.reader import CompressedModel
from entrollm.matrix import code_of, matrix_of
from tests.support.golden_trellis import FLAT, KIND, golden_symbols, write_golden_trellis

TRELLIS = Path(__file__).parent / "v2-trellis"
SHA256 = "e584f57bb8542e02a1346c223229d4ea656e978663e41156c6289d44ab4d9c7c"
POOL = _core.ThreadPool(1)


def test_the_file_is_untouched() -> None:
    assert hashlib.sha256((TRELLIS / "model.safetensors").read_bytes()).hexdigest() == SHA256


@pytest.mark.parametrize("name", golden_symbols())
def test_the_integers_are_as_stated(name: str, tmp_path: Path) -> None:
    # Deflate may give other bytes elsewhere, so what is written now is read back and not compared.
    write_golden_trellis(tmp_path)
    symbols = golden_symbols()[name]
    steps = np.array([reference.half_steps_of_row(row) for row in symbols.tolist()])
    for folder in (TRELLIS, tmp_path):
        with CompressedModel.open(folder) as model:
            model.check_checksum(name + ".weight")
            matrix = matrix_of(model, name + ".weight")
            assert matrix.spec.kind == KIND
            rows = np.arange(len(symbols))
            np.testing.assert_array_equal(code_of(model, name + ".weight").symbols(0, len(rows), POOL), symbols)
            for form in (matrix, matrix.to_flat(POOL)):
                np.testing.assert_array_equal(form.symbols(0, len(rows), POOL), steps)
                np.testing.assert_array_equal(form.dequantize(rows, POOL), (steps - 127.5) * 0.125)


def test_the_first_half_steps_are_written_out() -> None:
    symbols = golden_symbols()[FLAT][0, :10]
    assert symbols.tolist() == [64, 64, 64, 64, 64, 65, 64, 62, 64, 64]
    assert reference.half_steps_of_row(symbols.tolist()) == [128, 128, 128, 128, 128, 130, 129, 124, 129, 128]


def test_verification_encodes_the_symbols_again() -> None:
    with CompressedModel.open(TRELLIS) as model:
        assert verify(model, POOL).weights == sum(symbols.size for symbols in golden_symbols().values())
