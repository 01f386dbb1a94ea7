"""Matrices whose bits must survive: ordinary ones, every kind of special number, and odd shapes."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

BF16, E4M3, E5M2 = ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2
_NAMES = {
    "bfloat16": "BF16",
    "float16": "F16",
    "float32": "F32",
    "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2",
}


def lossless_cases() -> dict[str, NDArray[Any]]:
    """Weights by the name of their tensor."""
    generator = np.random.default_rng(20)

    def gaussian(rows: int, columns: int) -> NDArray[np.float32]:
        return (generator.standard_normal((rows, columns)) * 0.02).astype(np.float32)

    every_word = generator.permutation(1 << 16).astype(np.uint16).reshape(256, 256)[:, :250]
    every_byte = np.resize(generator.permutation(256).astype(np.uint8), (9, 70))
    return {
        "bf16.weight": gaussian(40, 130).astype(BF16),
        "f16.weight": gaussian(7, 65).astype(np.float16),
        "f32.weight": gaussian(9, 100).astype(BF16).astype(np.float32),
        "e4m3.weight": (gaussian(5, 64) * 100).astype(E4M3),
        "e5m2.weight": gaussian(3, 129).astype(E5M2),
        "parts.weight": gaussian(3, 4200).astype(BF16),
        # NaNs of every payload, infinities, denormals and both zeros.
        "words.weight": every_word.view(BF16),
        "halves.weight": every_word[:50].view(np.float16),
        "bytes4.weight": every_byte.view(E4M3),
        "bytes5.weight": every_byte.view(E5M2),
        "zero.weight": np.zeros((3, 64), BF16),
        "minus.weight": np.full((3, 5), -0.0, np.float16),
        "one.weight": np.full((1, 1), 3, E4M3),
    }


def write_tensors(folder: Path, tensors: dict[str, NDArray[Any]]) -> None:
    """Write a checkpoint of these tensors, whose config names no architecture."""
    folder.mkdir(parents=True)
    header: dict[str, Any] = {}
    data = b""
    for name, array in tensors.items():
        end = len(data) + array.nbytes
        header[name] = {
            "dtype": _NAMES[str(array.dtype)],
            "shape": list(array.shape),
            "data_offsets": [len(data), end],
        }
        data += array.tobytes()
    text = json.dumps(header).encode()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + data)
    (folder / "config.json").write_text('{"model_type": "other"}')
