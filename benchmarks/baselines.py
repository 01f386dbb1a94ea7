"""The baseline products, compiled for this processor at first use."""

from __future__ import annotations

import ctypes
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

SOURCE = Path(__file__).parent / "native" / "baselines.cpp"
KINDS = {"read": 0, "int8": 1, "int4": 2, "bf16": 3}


class Baselines:
    """Products with full-width weights; `product` returns the elapsed seconds of one pass."""

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="baselines-")
        library = Path(self._folder.name) / "baselines.so"
        command = ["c++", "-std=c++20", "-O3", "-march=native", "-shared", "-fPIC", "-pthread"]
        subprocess.run([*command, str(SOURCE), "-o", str(library)], check=True)
        self._product = ctypes.CDLL(str(library)).baseline_product
        self._product.restype = ctypes.c_double

    def product(self, kind: str, weights: NDArray[np.uint8], columns: int, x: NDArray[Any], threads: int) -> float:
        """Time one product.

        Args:
            kind: a key of KINDS.
            weights: the bytes of all rows.
            columns: weights per row, a multiple of 512.
            x: int8 activations (float32 for bf16).
        """
        row_bytes = {"read": columns, "int8": columns, "int4": columns // 2, "bf16": 2 * columns}[kind]
        rows = weights.size // row_bytes
        y = np.empty(rows, np.float32)
        pointers = [ctypes.c_void_p(array.ctypes.data) for array in (weights, x, y)]
        return float(
            self._product(
                KINDS[kind],
                pointers[0],
                ctypes.c_size_t(rows),
                ctypes.c_size_t(columns),
                pointers[1],
                pointers[2],
                threads,
            )
        )
