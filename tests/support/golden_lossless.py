"""What the golden file of lossless words holds, by formulas without any library's random numbers."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from entrollm import _core
from entrollm.codec.reference import divide_word
from entrollm.format import layout
from entrollm.format.blocks import Blocks
from entrollm.format.code import Code, Field, Leaf
from entrollm.format.flat import AnyCode, FlatCode
from entrollm.format.lossless import GRID_NAME, LosslessKind
from entrollm.format.spec import TensorSpec
from entrollm.format.stored import store_matrix
from entrollm.format.writer import ShardWriter

_RAW = Code(Field(8, ()))
_CASCADE = Code(Field(2, (127, 126, 125), Field(8, ())))


@dataclass(frozen=True)
class GoldenWords:
    """A matrix: its original type, the type of its words, its code and its shape; the words follow from these."""

    dtype: str
    type: str
    code: AnyCode
    shape: tuple[int, int]

    @property
    def bits(self) -> int:
        """Bits of a word."""
        return 16 if LosslessKind(self.type).has_low else 8

    def words(self) -> list[list[int]]:
        """The words by row: multiples of an odd number, so that every bit changes."""
        rows, columns = self.shape
        if isinstance(self.code, FlatCode):
            # Exponents from 120 on: the last eight are outside of the window, the last one by two patches.
            return [
                [((i * columns + j) * 40503 % 2048 + 120 * 128) | j % 2 << 15 for j in range(columns)]
                for i in range(rows)
            ]
        if self.code.tree == Leaf(0):
            return [[(i * j) % 2 << self.bits - 1 for j in range(columns)] for i in range(rows)]
        return [[(i * columns + j) * 40503 % (1 << self.bits) for j in range(columns)] for i in range(rows)]


CASES = {
    "bf16": GoldenWords("BF16", "BF16", _CASCADE, (5, 70)),
    "f16": GoldenWords("F16", "F16", _RAW, (3, 64)),
    "f32": GoldenWords("F32", "BF16", _RAW, (2, 5)),
    "e4m3": GoldenWords("F8_E4M3", "F8_E4M3", _CASCADE, (4, 70)),
    "e5m2": GoldenWords("F8_E5M2", "F8_E5M2", _RAW, (4, 65)),
    "flat": GoldenWords("BF16", "BF16", FlatCode(2), (3, 70)),
    "zeros": GoldenWords("BF16", "BF16", Code(Leaf(0)), (2, 3)),
}


_WINDOWS = np.array([3 | 120 << 8] * 2, np.uint16)


def _encode(code: AnyCode, symbols: NDArray[np.uint8]) -> tuple[Blocks, dict[str, NDArray[Any]]]:
    rows, columns = symbols.shape
    arrays: dict[str, NDArray[Any]] = {}
    if isinstance(code, FlatCode):
        blocks = code.blocks(columns)
        dense, patches, sizes, _ = _core.encode_flat(symbols, code.segment_rows, _WINDOWS)
        sparse, arrays[layout.SEGMENTS] = patches.view(np.uint8), _WINDOWS
    else:
        blocks = Blocks(rows, -(-columns // 64) * 64)
        dense, sparse, sizes = _core.encode(code.program(), 0, symbols, blocks.rows, blocks.columns)
    arrays |= {layout.DENSE: layout.padded_stream([dense]), layout.SPARSE: layout.padded_stream([sparse])}
    return blocks, arrays | ({layout.SPARSE_SIZES: sizes} if sparse.size else {})


def write_golden_lossless(path: Path) -> None:
    """Write the folder."""
    path.mkdir(parents=True, exist_ok=True)
    config = {"model_type": "llama", "quantization_config": {"quant_method": "entrollm", "version": 2}}
    (path / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    with ShardWriter(path / "model.safetensors") as writer:
        for name, case in CASES.items():
            rows, columns = case.shape
            pairs = [[divide_word(word, case.bits) for word in row] for row in case.words()]
            symbols = np.array([[symbol for symbol, _ in row] for row in pairs], np.uint8)
            blocks, arrays = _encode(case.code, symbols)
            if case.bits == 16:
                arrays[layout.LOW] = layout.padded_stream([np.array(pairs, np.uint8)[:, :, 1].reshape(-1)])
            spec = TensorSpec(rows, columns, case.dtype, GRID_NAME, case.code, blocks, LosslessKind(case.type))
            writer.add_matrix(store_matrix(name + ".weight", spec, arrays))
