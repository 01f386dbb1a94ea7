"""Layers of 4-bit floats (E2M1), packed weight by weight, and the weights that they mean."""

from __future__ import annotations

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from tests.support.quantized_sources import Arrays, Packer

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


def mxfp4_packer(part: str) -> Packer:
    """Packs layers with exponents of 32 inputs; `part` is the name of the packed tensor."""

    def pack(generator: np.random.Generator, rows: int, columns: int) -> tuple[Arrays, NDArray[np.float32]]:
        octets, values = random_pairs(generator, rows, columns)
        exponents = generator.integers(118, 122, (rows, columns // 32)).astype(np.uint8)
        scale = np.exp2(exponents.astype(np.float32) - 127)
        return {part: octets, "weight_scale": exponents}, values * np.repeat(scale, 32, axis=1)

    return pack


def nvfp4_packer(part: str, *, divides: bool) -> Packer:
    """Packs layers with fp8 scales of 16 inputs and one float that divides or multiplies them."""

    def pack(generator: np.random.Generator, rows: int, columns: int) -> tuple[Arrays, NDArray[np.float32]]:
        octets, values = random_pairs(generator, rows, columns)
        scales = generator.uniform(20, 448, (rows, columns // 16)).astype(ml_dtypes.float8_e4m3fn)
        whole = np.float32(generator.uniform(6000, 9000))
        if not divides:
            whole = np.float32(1) / whole
        wide = scales.astype(np.float32)
        effective = wide / whole if divides else wide * whole
        name = "weight_global_scale" if divides else "weight_scale_2"
        parts = {part: octets, "weight_scale": scales, name: np.full(1, whole) if divides else np.array(whole)}
        return {**parts, "input_scale": np.ones((), np.float32)}, values * np.repeat(effective, 16, axis=1)

    return pack
