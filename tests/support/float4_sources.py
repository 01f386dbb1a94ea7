"""Layers of 4-bit floats (E2M1), packed weight by weight, and the weights that they mean."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from tests.support.quantized_sources import Arrays

VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def random_pairs(
    generator: np.random.Generator, rows: int, columns: int
) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    """Bytes (rows, columns / 2) of two neighbouring weights, the first in the low half, and their values."""
    patterns = generator.integers(0, 16, (rows, columns))
    values = [[VALUES[bits & 7] * (-1 if bits & 8 else 1) for bits in row] for row in patterns.tolist()]
    return (patterns[:, ::2] | patterns[:, 1::2] << 4).astype(np.uint8), np.array(values, np.float32)


def pack_stack(generator: np.random.Generator, rows: int, columns: int) -> tuple[Arrays, NDArray[np.float32]]:
    """A stack of two experts as GPT-OSS stores it, and the weights of the first."""
    octets, values = random_pairs(generator, 2 * rows, columns)
    exponents = generator.integers(118, 122, (2, rows, columns // 32)).astype(np.uint8)
    parts = {"stack_blocks": octets.reshape(2, rows, columns // 32, 16), "stack_scales": exponents}
    scale = np.exp2(exponents[0].astype(np.float32) - 127)
    return parts, values[:rows] * np.repeat(scale, 32, axis=1)
