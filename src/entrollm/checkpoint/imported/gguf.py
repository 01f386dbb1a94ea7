"""Blocks of GGUF files.

Q8_0: 32 weights, f16 d, 32 int8; W = q * d. Q4_0: 32 weights, f16 d, 16 bytes of nibbles, all low ones first;
W = (q - 8) * d. Q4_1: f16 d and m, nibbles; W = q * d + m. Q5_0, Q5_1: the same with 32 fifth bits before the nibbles,
W = (q - 16) * d and q * d + m. Q4_K: 256 weights, f16 d and dmin, 12 bytes with eight 6-bit scales and minimums, 128
bytes of nibbles, the low ones of 32 bytes before their high ones; W = (d * scale) * q - dmin * minimum. Q5_K: the same
with 32 bytes before the nibbles, of which bit n is the fifth bit of 32 weights. Q6_K: 256 weights, 128 bytes of low
nibbles, 64 of high bit pairs, 16 int8 scales, f16 d; W = (d * scale) * (q - 32).

ggml computes in float32. Every product above is exact in float32, with at most 24 significant bits, so the order of
factors does not matter.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from entrollm.checkpoint.imported.formats import ImportedMatrix, ImportedWeights, RawTensors, group_scales
from entrollm.errors import FormatError
from entrollm.format.group_scales import GroupScales

Octets = NDArray[np.uint8]
_SMALL, _SUPER = 32, 256


def recognise(quantization: Mapping[str, Any]) -> bool:
    """Whether a quantization_config is the one that `gguf_model` makes for a file."""
    return quantization.get("quant_method") == "gguf"


def matrices(quantization: Mapping[str, Any], tensors: RawTensors) -> Iterator[ImportedMatrix]:
    """The quantized matrices of a file; see `Format`. `types` of the config names the block type of each."""
    for name, kind in quantization["types"].items():
        rows, row_bytes = tensors.entries[name].shape
        weights, size_bytes, _ = _BLOCKS[kind]
        read = functools.partial(_read, name, kind, tensors)
        yield ImportedMatrix(name, (rows, row_bytes // size_bytes * weights), "F32", (name,), read)


def _read(name: str, kind: str, tensors: RawTensors) -> ImportedWeights:
    _, size_bytes, unpack = _BLOCKS[kind]
    octets = tensors.array(name)
    rows = len(octets)
    symbols, scales = unpack(octets.reshape(rows, -1, size_bytes))
    for part, array in scales.arrays.items():
        if array.dtype == np.float16 and not np.isfinite(array).all():
            raise FormatError(f"{name}: its {part} has a value that is not finite")
    return ImportedWeights(np.ascontiguousarray(symbols.reshape(rows, -1)), scales)


def _half(octets: Octets) -> NDArray[np.float16]:
    """The 16-bit floats of (rows, blocks, 2) bytes, as (rows, blocks)."""
    return np.ascontiguousarray(octets).view(np.float16)[..., 0]


def _q8_0(blocks: Octets) -> tuple[Octets, GroupScales]:
    return blocks[..., 2:] ^ np.uint8(128), _scales(blocks, zero=128)  # int8 plus 128


def _q4_0(blocks: Octets) -> tuple[Octets, GroupScales]:
    return _halves(blocks[..., 2:]), _scales(blocks, zero=8)


def _q4_1(blocks: Octets) -> tuple[Octets, GroupScales]:
    return _halves(blocks[..., 4:]), _scales(blocks, zero=None)


def _q5_0(blocks: Octets) -> tuple[Octets, GroupScales]:
    return _halves(blocks[..., 6:]) | _fifth(blocks[..., 2:6]), _scales(blocks, zero=16)


def _q5_1(blocks: Octets) -> tuple[Octets, GroupScales]:
    return _halves(blocks[..., 8:]) | _fifth(blocks[..., 4:8]), _scales(blocks, zero=None)


def _halves(octets: Octets) -> Octets:
    """The low nibbles of 16 bytes, then their high ones."""
    return np.concatenate([octets & np.uint8(15), octets >> 4], axis=-1)


def _fifth(octets: Octets) -> Octets:
    """The fifth bits of 32 weights."""
    return np.unpackbits(octets, axis=-1, bitorder="little") << np.uint8(4)


def _scales(blocks: Octets, zero: int | None) -> GroupScales:
    """One scale for each 32 weights, followed by a minimum if there is no zero."""
    arrays = {"group_scale": _half(blocks[..., :2])}
    if zero is None:
        arrays["group_minimum"] = -_half(blocks[..., 2:4])
    return group_scales({"size": _SMALL}, arrays, zero)


def _q4_k(blocks: Octets) -> tuple[Octets, GroupScales]:
    return _nibbles(blocks[..., 16:]), _k_scales(blocks)


def _q5_k(blocks: Octets) -> tuple[Octets, GroupScales]:
    fifth = blocks[..., None, 16:48] >> np.arange(8, dtype=np.uint8)[:, None] & np.uint8(1)
    return _nibbles(blocks[..., 48:]) | fifth << np.uint8(4), _k_scales(blocks)


def _nibbles(octets: Octets) -> Octets:
    """The low nibbles of 32 bytes, their high nibbles, the low nibbles of the next 32, ...: (rows, blocks, 8, 32)."""
    rows, count, _ = octets.shape
    runs = octets.reshape(rows, count, 4, 1, 32)
    return np.concatenate([runs & np.uint8(15), runs >> 4], axis=3).reshape(rows, count, 8, 32)


def _k_scales(blocks: Octets) -> GroupScales:
    rows = len(blocks)
    packed = blocks[..., 4:16]
    low, middle, high = packed[..., 0:4], packed[..., 4:8], packed[..., 8:12]
    scale = np.concatenate([low & 63, (high & 15) | (low >> 6 << 4)], axis=-1)
    minimum = np.concatenate([middle & 63, (high >> 4) | (middle >> 6 << 4)], axis=-1)
    arrays = {
        "group_scale": scale.reshape(rows, -1),
        "group_minimum": minimum.reshape(rows, -1),
        "super_scale": _half(blocks[..., 0:2]),
        "super_minimum": _half(blocks[..., 2:4]),
    }
    return group_scales({"size": _SMALL, "super_size": _SUPER}, arrays)


def _q6_k(blocks: Octets) -> tuple[Octets, GroupScales]:
    rows, count, _ = blocks.shape
    # A block has two halves of 128 weights, and a half has four runs of 32.
    low = blocks[..., :128].reshape(rows, count, 2, 2, 32)
    pairs = blocks[..., 128:192].reshape(rows, count, 2, 1, 32)
    nibbles = np.concatenate([low & np.uint8(15), low >> 4], axis=3)
    upper = np.concatenate([pairs >> np.uint8(shift) & np.uint8(3) for shift in (0, 2, 4, 6)], axis=3)
    arrays: dict[str, NDArray[Any]] = {
        "group_scale": np.ascontiguousarray(blocks[..., 192:208]).view(np.int8).reshape(rows, -1),
        "super_scale": _half(blocks[..., 208:210]),
    }
    return nibbles | upper << 4, group_scales({"size": 16, "super_size": _SUPER}, arrays, zero=32)


# For each type: the weights and the bytes of a block, and the function that unpacks blocks.
_BLOCKS: Mapping[str, tuple[int, int, Callable[[Octets], tuple[Octets, GroupScales]]]] = {
    "Q8_0": (32, 34, _q8_0),
    "Q5_1": (32, 24, _q5_1),
    "Q5_0": (32, 22, _q5_0),
    "Q4_1": (32, 20, _q4_1),
    "Q4_0": (32, 18, _q4_0),
    "Q6_K": (256, 210, _q6_k),
    "Q5_K": (256, 176, _q5_k),
    "Q4_K": (256, 144, _q4_k),
}
