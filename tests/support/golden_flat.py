"""What the golden file of flat codes holds: every width, patches of every kind, and the words written out."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from entrollm import _core
from entrollm.format import layout
from entrollm.format.flat import FlatCode
from entrollm.format.grid import GridKind
from entrollm.format.spec import TensorSpec
from entrollm.format.stored import StoredMatrix, store_matrix
from entrollm.format.writer import ShardWriter

SEGMENT_ROWS = 2


def _crowd(rows: int, columns: int, least: int, size: int) -> NDArray[np.uint8]:
    """Symbols from `least` on, `size` different ones."""
    places = np.arange(rows * columns, dtype=np.int64)
    return (least + places**2 // 7 % size).astype(np.uint8).reshape(rows, columns)


def _widths() -> NDArray[np.uint8]:
    """Two rows of each width from 2 to 8, with strays near, far and several in a row."""
    rows = [_crowd(2, 100, 60, 2**bits) for bits in range(2, 8)] + [_crowd(2, 100, 0, 256)]
    symbols = np.concatenate(rows)
    symbols[::2, 99] = 50
    symbols[1::2, :2] = 210
    return symbols


def _wide() -> NDArray[np.uint8]:
    symbols = _crowd(1, 9000, 120, 4)
    symbols[0, [8200, 8201, 8999]] = 119, 131, 255
    return symbols


CASES: dict[str, tuple[NDArray[np.uint8], list[tuple[int, int]]]] = {
    "widths": (_widths(), [(bits, 60) for bits in range(2, 8)] + [(8, 0)]),
    "without.patches": (_crowd(3, 64, 0, 16), [(4, 0), (4, 0)]),
    "wide": (_wide(), [(2, 120)]),
}
"""By name: symbols, and the width and the first symbol of each segment."""


def golden_matrix(name: str) -> StoredMatrix:
    """One matrix of the golden file."""
    symbols, windows = CASES[name]
    return store_flat(name, symbols, windows, SEGMENT_ROWS, GridKind(scale=0.125, zero=2.5))


def store_flat(
    name: str, symbols: NDArray[np.uint8], windows: Sequence[tuple[int, int]], segment_rows: int, kind: GridKind
) -> StoredMatrix:
    """A matrix of flat fields; `windows` are the width and the first symbol of each segment."""
    stored = np.array([bits | base << 8 for bits, base in windows], np.uint16)
    fields, patches, sizes, _ = _core.encode_flat(symbols, segment_rows, stored)
    code = FlatCode(segment_rows)
    spec = TensorSpec(*symbols.shape, "F32", "golden", code, code.blocks(symbols.shape[1]), kind)
    arrays = {
        layout.DENSE: layout.padded_stream([fields]),
        layout.SPARSE: layout.padded_stream([patches.view(np.uint8)]),
        layout.SEGMENTS: stored,
    }
    if patches.size:
        arrays[layout.SPARSE_SIZES] = sizes
    return store_matrix(name + ".weight", spec, arrays)


def write_golden_flat(path: Path) -> None:
    """Write the folder."""
    write_golden_folder(path, map(golden_matrix, CASES))


def write_golden_folder(path: Path, matrices: Iterable[StoredMatrix]) -> None:
    """Write a folder of matrices and a config.json."""
    path.mkdir(parents=True, exist_ok=True)
    config = {"model_type": "llama", "quantization_config": {"quant_method": "entrollm", "version": 2}}
    (path / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    with ShardWriter(path / "model.safetensors") as writer:
        for matrix in matrices:
            writer.add_matrix(matrix)
