"""The file of matrices with group scales, byte for byte, and what it means."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest

from entrollm import _core
from entrollm.format.reader import CompressedModel
from entrollm.matrix import matrix_of, multiply
from tests.support.golden_groups import CASES, COLUMNS, ROWS, SYMBOLS, expected_weight, write_golden_groups

GROUPS = Path(__file__).parent / "v1-groups"
SHA256 = "3e1a484258fc43bf78cf8e8508be9d25dd1ee4c365952bff81b3c2839c2b86a2"


def test_the_file_is_untouched() -> None:
    assert hashlib.sha256((GROUPS / "model.safetensors").read_bytes()).hexdigest() == SHA256


@pytest.mark.parametrize("name", CASES)
def test_the_weights_are_as_stated(name: str, tmp_path: Path) -> None:
    # Deflate may give other bytes elsewhere, so what is written now is read back and not compared.
    write_golden_groups(tmp_path)
    pool = _core.ThreadPool(1)
    expected = np.array([[expected_weight(name, i, j) for j in range(COLUMNS)] for i in range(ROWS)], np.float32)
    for folder in (GROUPS, tmp_path):
        with CompressedModel.open(folder) as model:
            model.check_checksum(name + ".weight")
            matrix = matrix_of(model, name + ".weight")
            np.testing.assert_array_equal(matrix.symbols(0, ROWS, pool), SYMBOLS)
            np.testing.assert_array_equal(matrix.dequantize(np.arange(ROWS), pool), expected)
            np.testing.assert_array_equal(matrix.dequantize(np.array([2, 0, 2]), pool), expected[[2, 0, 2]])
            x = np.linspace(-1, 1, 2 * COLUMNS, dtype=np.float32).reshape(2, COLUMNS)
            found = multiply([matrix, matrix], x, pool)
            # Products are of the weights before they are rounded to half precision.
            tolerance = {"BF16": 2**-7, "F16": 2**-10}.get(CASES[name][0].get("arithmetic", ""), 2**-14)
            bound = tolerance * np.abs(x) @ np.abs(expected).T
            np.testing.assert_array_less(np.abs(found[:, ROWS:] - x @ expected.T), bound + 1e-12)
