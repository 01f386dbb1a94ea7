"""What the golden file of matrices with a trellis holds: rows of one block and of several, low bits, a flat code."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from entrollm import _core
from entrollm.format import layout
from entrollm.format.blocks import Blocks
from entrollm.format.code import Code, Field, Leaf
from entrollm.format.grid import GridKind
from entrollm.format.spec import TensorSpec
from entrollm.format.stored import StoredMatrix, store_matrix
from tests.support.golden_cases import Golden
from tests.support.golden_flat import store_flat, write_golden_folder

KIND = GridKind(scale=0.125, zero=127.5, trellis=True)
_CASCADE = Field(1, (64,), Field(2, (63, 65, 62), Field(3, (66, 61, 67, 60, 0, 127, 1, 126))))
CODED: dict[str, Golden] = {
    "rows": Golden(Code(_CASCADE), (7, 130), Blocks(3, 192)),
    "parts": Golden(Code(_CASCADE), (5, 300), Blocks(2, 128)),
    "low": Golden(Code(Field(1, (60, 64)), low_bits=2), (3, 150), Blocks(3, 192)),
    "constant": Golden(Code(Leaf(63)), (2, 70), Blocks(2, 128)),
}
FLAT = "flat"
_SEGMENT_ROWS = 2
_WINDOWS = ((2, 62), (3, 60))


def golden_symbols() -> dict[str, NDArray[np.uint8]]:
    """The symbols of each matrix by its name."""
    flat = Golden(Code(_CASCADE), (4, 130), Blocks(2, 192))
    return {name: golden.symbols() for name, golden in {**CODED, FLAT: flat}.items()}


def _coded(name: str, symbols: NDArray[np.uint8]) -> StoredMatrix:
    golden = CODED[name]
    dense, sparse, sizes = _core.encode(
        golden.code.program(), golden.code.low_bits, symbols, golden.blocks.rows, golden.blocks.columns
    )
    arrays: dict[str, NDArray[Any]] = {
        layout.DENSE: layout.padded_stream([dense]),
        layout.SPARSE: layout.padded_stream([sparse]),
        layout.SPARSE_SIZES: sizes if sparse.size else np.zeros(0, np.uint16),
    }
    spec = TensorSpec(*golden.shape, "F32", "golden", golden.code, golden.blocks, KIND)
    return store_matrix(name + ".weight", spec, arrays)


def write_golden_trellis(path: Path) -> None:
    """Write the folder."""
    write_golden_folder(
        path,
        (
            store_flat(FLAT, symbols, _WINDOWS, _SEGMENT_ROWS, KIND) if name == FLAT else _coded(name, symbols)
            for name, symbols in golden_symbols().items()
        ),
    )
