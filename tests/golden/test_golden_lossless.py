"""The file of lossless matrices, byte for byte, and what it means."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest

from entrollm import _core
from entrollm.format import layout
from entrollm.format.reader import CompressedModel
from entrollm.matrix import matrix_of
from tests.support.golden_lossless import CASES, write_golden_lossless

LOSSLESS = Path(__file__).parent / "v2-lossless"
SHA256 = "1f64a153f3bdfab220e588cbd9b4714a27a8399d126b9d735f7c2a1e5c3b235d"


def test_the_file_is_untouched() -> None:
    assert hashlib.sha256((LOSSLESS / "model.safetensors").read_bytes()).hexdigest() == SHA256


@pytest.mark.parametrize("name", CASES)
def test_the_words_are_as_stated(name: str, tmp_path: Path) -> None:
    # Deflate may give other bytes elsewhere, so what is written now is read back and not compared.
    write_golden_lossless(tmp_path)
    case = CASES[name]
    words = np.array(case.words(), f"u{case.bits // 8}")
    for folder in (LOSSLESS, tmp_path):
        with CompressedModel.open(folder) as model:
            model.check_checksum(name + ".weight")
            matrix = matrix_of(model, name + ".weight")
            found = matrix.original(0, case.shape[0], _core.ThreadPool(1))
            assert found.itemsize == (4 if case.dtype == "F32" else case.bits // 8)
            upper = found.view(np.uint32) >> 16 if case.dtype == "F32" else found.view(words.dtype)
            np.testing.assert_array_equal(upper, words)
            assert (layout.LOW in model.entries(name + ".weight")) == (case.bits == 16)


def test_some_words_are_written_out() -> None:
    """Against a change of the formula itself."""
    assert CASES["bf16"].words()[0][:4] == [0, 0x9E37, 0x3C6E, 0xDAA5]
