"""What the golden files of each format version hold, without any library's random numbers."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from entrollm import _core
from entrollm.codec.reference import code_bits
from entrollm.format import layout
from entrollm.format.blocks import Blocks
from entrollm.format.code import Code, Field, Leaf, Node, Split
from entrollm.format.grid import GridKind
from entrollm.format.spec import TensorSpec
from entrollm.format.stored import store_matrix
from entrollm.format.writer import ShardWriter
from tests.support.version1 import Version1Writer


@dataclass(frozen=True)
class Golden:
    """One matrix: its code, shape and blocks; the integers follow from these."""

    code: Code
    shape: tuple[int, int]
    blocks: Blocks

    def symbols(self) -> NDArray[np.uint8]:
        """The integers that the file must decode to; small codes are the likelier."""
        step = 1 << self.code.low_bits
        lengths = {s: code_bits(self.code.tree, s) for s in range(0, 256, step)}
        high = sorted((s for s in lengths if lengths[s] is not None), key=lambda s: (lengths[s], s))
        alphabet = [symbol + low for symbol in high for low in range(step)]
        state, values = 1, []
        for _ in range(self.shape[0] * self.shape[1]):
            index = len(alphabet)
            for _ in range(4):
                state = state * 6364136223846793005 + 1442695040888963407 & 2**64 - 1
                index = index * (state >> 48)
            values.append(alphabet[index >> 64])
        return np.array(values, np.uint8).reshape(self.shape)


def _flat(bits: int) -> Node:
    return Field(bits, tuple(range(3, 3 + 2**bits)))


_CASCADE = Field(1, (7,), Field(2, (6, 8, 5), Field(3, (9, 4, 10, 3, 11, 2, 12), Field(8, ()))))
_PIVOT = Split(
    Split(Field(1, (1, 2)), Field(1, (3,), Field(2, (4, 5, 6), Split(_flat(2), Field(1, (20, 21)))))),
    Field(2, (30, 31, 32), Field(6, tuple(range(40, 104)))),
)
_WIDE = Field(6, tuple(range(63)), Field(5, tuple(range(63, 94)), Field(4, tuple(range(94, 110)))))

SCALES = {"scale": 16, "column_scale": 64}
GOLDEN: dict[str, Golden] = {
    "leaf": Golden(Code(Leaf(9)), (3, 5), Blocks(3, 64)),
    "leaf.low3": Golden(Code(Leaf(64), low_bits=3), (2, 70), Blocks(2, 128)),
    "raw": Golden(Code(Field(8, ())), (2, 65), Blocks(2, 128)),
    **{f"flat{bits}": Golden(Code(_flat(bits)), (3, 150), Blocks(3, 192)) for bits in range(1, 7)},
    **{
        f"low{bits}": Golden(Code(Field(1, (0, 1 << bits)), low_bits=bits), (3, 150), Blocks(3, 192))
        for bits in range(1, 7)
    },
    "cascade": Golden(Code(_CASCADE), (2, 640), Blocks(2, 640)),
    "pivot": Golden(Code(_PIVOT), (2, 640), Blocks(2, 640)),
    "wide": Golden(Code(_WIDE), (1, 1000), Blocks(1, 1024)),
    "rows": Golden(Code(_CASCADE), (7, 130), Blocks(3, 192)),
    "parts": Golden(Code(_PIVOT), (2, 300), Blocks(1, 128)),
    "rows.parts": Golden(Code(_CASCADE), (5, 300), Blocks(2, 128)),
    "low.parts": Golden(Code(Split(Field(8, ()), Field(1, (4, 8))), low_bits=2), (5, 300), Blocks(2, 256)),
}


def golden_spec(golden: Golden, per_row: bool) -> TensorSpec:
    """The spec of a matrix; the checksum is filled in by the writer."""
    return TensorSpec(
        rows=golden.shape[0],
        columns=golden.shape[1],
        dtype="F32",
        grid_name="golden",
        code=golden.code,
        blocks=golden.blocks,
        kind=GridKind(scale=None if per_row else 0.125, offset=None if per_row else -0.5),
        relative_error=0.0,
    )


def write_golden(path: Path, version: int = 1) -> None:
    """Write the folder of a format version."""
    path.mkdir(parents=True, exist_ok=True)
    config = {"model_type": "llama", "quantization_config": {"quant_method": "entrollm", "version": version}}
    (path / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    with (Version1Writer if version == 1 else ShardWriter)(path / "model.safetensors") as writer:
        for name, golden in GOLDEN.items():
            symbols, code = golden.symbols(), golden.code
            dense, sparse, sizes = _core.encode(
                code.program(), code.low_bits, symbols, golden.blocks.rows, golden.blocks.columns
            )
            arrays: dict[str, NDArray[Any]] = {
                layout.DENSE: layout.padded_stream([dense]),
                layout.SPARSE: layout.padded_stream([sparse]),
                layout.SPARSE_SIZES: sizes if sparse.size else np.zeros(0, np.uint16),
            }
            per_row = name == "rows.parts"
            if per_row:
                arrays |= golden_scales()
            spec = golden_spec(golden, per_row)
            if version > 1 and name == "rows":
                spec, arrays = (
                    replace(spec, kind=replace(spec.kind, offset=None, zero=7.25, stored=SCALES)),
                    arrays | golden_codes(),
                )
            if isinstance(writer, Version1Writer):
                writer.add_matrix(name + ".weight", spec, arrays)
            else:
                writer.add_matrix(store_matrix(name + ".weight", spec, arrays))
        writer.add_plain("norm.weight", "F32", (4,), [np.array([1, 0.5, -2, 0], np.float32)])
        writer.add_plain("scalar", "F16", (), [np.array(3, np.float16)])


def golden_codes() -> dict[str, NDArray[Any]]:
    """The scales, as codes, of the matrix that has them so since version 2."""
    return {
        layout.SCALE: np.array([128, 127, 129, 144, 0, 255, 133], np.uint8),
        layout.COLUMN_SCALE: np.arange(60, 190, dtype=np.uint8),
    }


def golden_scales() -> dict[str, NDArray[Any]]:
    """The scales of the matrix that has them per row and column."""
    return {
        layout.SCALE: np.array([0.5, 1, 2, 4, 0.25], np.float32),
        layout.OFFSET: np.array([0, -1, 1, -2, 2], np.float32),
        layout.COLUMN_SCALE: np.array([1 + i % 3 for i in range(300)], np.float32),
    }
