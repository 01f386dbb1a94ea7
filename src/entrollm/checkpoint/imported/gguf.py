"""Blocks of GGUF files.

Q8_0: 32 weights, f16 d, 32 int8; W = q * d. Q4_0: 32 weights, f16 d, 16 bytes of nibbles, all low ones first;
W = (q - 8) * d. Q4_1: f16 d and m, nibbles; W = q * d + m. Q5_0, Q5_1: the same with 32 fifth bits before the nibbles,
W = (q - 16) * d and q * d + m. Q4_K: 256 weights, f16 d and dmin, 12 bytes with eight 6-bit scales and minimums, 128
bytes of nibbles, the low ones of 32 bytes before their high ones; W = (d * scale) * q - dmin * minimum. Q5_K: the same
with 32 bytes before the nibbles, of which bit n is the fifth bit of 32 weights. Q6_K: 256 weights, 128 bytes of low
nibbles, 64 of high bit pairs, 16 int8 scales, f16 d; W = (d * scale) * (q - 32). Q2_K: 256 weights, 16 bytes with a
4-bit scale and a 4-bit minimum each, 64 bytes of bit pairs, f16 d and dmin; as Q4_K. Q3_K: 256 weights, 32 bytes of
third bits, 64 of bit pairs, 12 with 16 6-bit scales, f16 d; W = (d * (scale - 32)) * (q - 4). Q8_K: 256 weights,
float32 d, 256 int8, 16 sums that are not needed; W = q * d.

IQ4_NL: as Q4_0, with the 16 values of `_IQ4_VALUES` in place of q - 8. IQ4_XS: 256 weights, f16 d, 8 6-bit scales, 128
bytes of nibbles as in IQ4_NL; W = (d * (scale - 32)) * value. TQ1_0: 256 weights, 52 bytes of five trits (the last four
of four trits), f16 d; TQ2_0: 64 bytes of bit pairs, f16 d; W = d * (q - 1). MXFP4: 32 weights, an exponent, nibbles;
W = value * 2^(exponent - 127) with the values of `float4`. NVFP4: 64 weights, four unsigned fp8 scales, 32 bytes of
nibbles; W = value * scale. `gguf_codebooks` has IQ1 to IQ3.

ggml computes in float32. Every product above is exact in float32, with at most 24 significant bits, so the order of
factors does not matter.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from entrollm.checkpoint.imported import float4, gguf_codebooks
from entrollm.checkpoint.imported.formats import ImportedMatrix, ImportedWeights, RawTensors, group_scales
from entrollm.errors import FormatError
from entrollm.files.gguf import BLOCK_TYPES
from entrollm.format.group_scales import BYTE_VALUES, GroupScales

Octets = NDArray[np.uint8]
_SMALL, _SUPER = 32, 256
_IQ4_VALUES = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
_IQ4_ZERO = 127
_IQ4_SYMBOLS = np.array([value + _IQ4_ZERO for value in _IQ4_VALUES], np.uint8)
# NVFP4's scales by their byte, halved for the integers of `float4`; the sign bit means nothing.
_NVFP4_SCALES = np.tile(np.nan_to_num(BYTE_VALUES["F8_E4M3"][:128]) / 2, 2).astype(np.float16)


def recognise(quantization: Mapping[str, Any]) -> bool:
    """Whether a quantization_config is the one that `gguf_model` makes for a file."""
    return quantization.get("quant_method") == "gguf"


def matrices(quantization: Mapping[str, Any], tensors: RawTensors) -> Iterator[ImportedMatrix]:
    """The quantized matrices of a file; see `Format`.

    `types` of the config names the block type of each; `columns` says where the columns of some belong.
    """
    for name, kind in quantization["types"].items():
        rows, row_bytes = tensors.entries[name].shape
        block = _SIZES[kind]
        read = functools.partial(_read, name, kind, tensors, quantization.get("columns", {}).get(name))
        yield ImportedMatrix(name, (rows, row_bytes // block.size_bytes * block.weights), "F32", (name,), read)


def dequantize(kind: str, octets: Octets) -> NDArray[np.float32]:
    """The weights of rows of blocks.

    Args:
        kind: the type of the blocks.
        octets: uint8 (rows, bytes of a row).
    Returns:
        float32 (rows, columns).
    Raises:
        FormatError: a block is malformed.
    """
    symbols, scales = _unpack(kind, octets)
    return scales.apply(symbols.astype(np.float32), slice(None))


def _unpack(kind: str, octets: Octets) -> tuple[Octets, GroupScales]:
    symbols, scales = _UNPACK[kind](octets.reshape(len(octets), -1, _SIZES[kind].size_bytes))
    return symbols.reshape(len(octets), -1), scales


def _read(name: str, kind: str, tensors: RawTensors, columns: list[int] | None = None) -> ImportedWeights:
    try:
        symbols, scales = _unpack(kind, tensors.array(name))
    except FormatError as error:  # which names the part of the blocks
        raise FormatError(f"{name}: {error}") from None
    if columns is not None:
        types = {**scales.form.types, "column_order": "U32"}
        arrays = {**scales.arrays, "column_order": np.array(columns, np.uint32)}
        scales = GroupScales(dataclasses.replace(scales.form, types=types), arrays)
    for part, array in scales.arrays.items():
        if array.dtype in (np.float16, np.float32) and not np.isfinite(array).all():
            raise FormatError(f"{name}: its {part} has a value that is not finite")
    return ImportedWeights(np.ascontiguousarray(symbols), scales)


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
    """The low nibbles of some bytes, then their high ones."""
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


def _q2_k(blocks: Octets) -> tuple[Octets, GroupScales]:
    rows = len(blocks)
    arrays = {
        "group_scale": (blocks[..., :16] & np.uint8(15)).reshape(rows, -1),
        "group_minimum": (blocks[..., :16] >> 4).reshape(rows, -1),
        "super_scale": _half(blocks[..., 80:82]),
        "super_minimum": _half(blocks[..., 82:84]),
    }
    return _bit_pairs(blocks[..., 16:80]), group_scales({"size": 16, "super_size": _SUPER}, arrays)


def _q3_k(blocks: Octets) -> tuple[Octets, GroupScales]:
    rows, count, _ = blocks.shape
    third = blocks[..., None, :32] >> np.arange(8, dtype=np.uint8)[:, None] & np.uint8(1)
    symbols = _bit_pairs(blocks[..., 32:96]) | (third << np.uint8(2)).reshape(rows, count, -1)
    low, high = blocks[..., 96:104], blocks[..., 104:108]
    fours = np.concatenate([low & np.uint8(15), low >> 4], axis=-1)
    twos = np.concatenate([high >> np.uint8(shift) & np.uint8(3) for shift in (0, 2, 4, 6)], axis=-1)
    arrays: dict[str, NDArray[Any]] = {
        "group_scale": ((fours | twos << 4).astype(np.int8) - np.int8(32)).reshape(rows, -1),
        "super_scale": _half(blocks[..., 108:110]),
    }
    return symbols, group_scales({"size": 16, "super_size": _SUPER}, arrays, zero=4)


def _bit_pairs(octets: Octets) -> Octets:
    """The lowest bit pairs of 32 bytes, their next ones, ..., then those of the next 32: (rows, blocks, weights)."""
    rows, count, size = octets.shape
    runs = octets.reshape(rows, count, size // 32, 1, 32)
    pairs = [runs >> np.uint8(shift) & np.uint8(3) for shift in (0, 2, 4, 6)]
    return np.concatenate(pairs, axis=3).reshape(rows, count, -1)


def _q8_k(blocks: Octets) -> tuple[Octets, GroupScales]:
    scale = np.ascontiguousarray(blocks[..., :4]).view(np.float32)[..., 0]
    return blocks[..., 4:260] ^ np.uint8(128), group_scales({"size": _SUPER}, {"group_scale": scale}, zero=128)


def _iq4_nl(blocks: Octets) -> tuple[Octets, GroupScales]:
    return _IQ4_SYMBOLS[_halves(blocks[..., 2:])], _scales(blocks, zero=_IQ4_ZERO)


def _iq4_xs(blocks: Octets) -> tuple[Octets, GroupScales]:
    rows, count, _ = blocks.shape
    high = np.ascontiguousarray(blocks[..., 2:4]).view(np.uint16) >> np.arange(0, 16, 2, dtype=np.uint16) & 3
    low = np.stack([blocks[..., 4:8] & np.uint8(15), blocks[..., 4:8] >> 4], axis=-1).reshape(rows, count, 8)
    arrays: dict[str, NDArray[Any]] = {
        "group_scale": ((low | high.astype(np.uint8) << 4).astype(np.int8) - np.int8(32)).reshape(rows, -1),
        "super_scale": _half(blocks[..., :2]),
    }
    symbols = _IQ4_SYMBOLS[_halves(blocks[..., 8:].reshape(rows, count, 8, 16))]
    return symbols, group_scales({"size": _SMALL, "super_size": _SUPER}, arrays, zero=_IQ4_ZERO)


def _tq1_0(blocks: Octets) -> tuple[Octets, GroupScales]:
    parts = []
    for begin, end, trits in ((0, 32, 5), (32, 48, 5), (48, 52, 4)):
        powers = np.array([3**place for place in range(trits)], np.uint8)[:, None]
        left = blocks[..., None, begin:end] * powers  # modulo 256, which drops the trits before
        parts.append((left.astype(np.uint16) * 3 >> 8).astype(np.uint8).reshape(*blocks.shape[:2], -1))
    scale = _half(blocks[..., 52:54])
    return np.concatenate(parts, axis=-1), group_scales({"size": _SUPER}, {"group_scale": scale}, zero=1)


def _tq2_0(blocks: Octets) -> tuple[Octets, GroupScales]:
    scale = _half(blocks[..., 64:66])
    return _bit_pairs(blocks[..., :64]), group_scales({"size": _SUPER}, {"group_scale": scale}, zero=1)


def _mxfp4(blocks: Octets) -> tuple[Octets, GroupScales]:
    scale = float4.half_powers("the exponents of MXFP4 blocks", blocks[..., 0])
    symbols = float4.SYMBOLS[_halves(blocks[..., 1:])]
    return symbols, group_scales({"size": _SMALL}, {"group_scale": scale}, zero=float4.ZERO)


def _nvfp4(blocks: Octets) -> tuple[Octets, GroupScales]:
    rows, count, _ = blocks.shape
    scale = _NVFP4_SCALES[blocks[..., :4]].reshape(rows, -1)
    symbols = float4.SYMBOLS[_halves(blocks[..., 4:].reshape(rows, count, 4, 8))]
    return symbols, group_scales({"size": 16}, {"group_scale": scale}, zero=float4.ZERO)


# The function that unpacks blocks of each type.
_UNPACK: Mapping[str, Callable[[Octets], tuple[Octets, GroupScales]]] = {
    "Q8_0": _q8_0,
    "Q5_1": _q5_1,
    "Q5_0": _q5_0,
    "Q4_1": _q4_1,
    "Q4_0": _q4_0,
    "Q8_K": _q8_k,
    "Q6_K": _q6_k,
    "Q5_K": _q5_k,
    "Q4_K": _q4_k,
    "Q3_K": _q3_k,
    "Q2_K": _q2_k,
    "IQ4_NL": _iq4_nl,
    "IQ4_XS": _iq4_xs,
    "IQ3_S": gguf_codebooks.iq3_s,
    "IQ3_XXS": gguf_codebooks.iq3_xxs,
    "IQ2_S": gguf_codebooks.iq2_s,
    "IQ2_XS": gguf_codebooks.iq2_xs,
    "IQ2_XXS": gguf_codebooks.iq2_xxs,
    "IQ1_M": gguf_codebooks.iq1_m,
    "IQ1_S": gguf_codebooks.iq1_s,
    "TQ1_0": _tq1_0,
    "TQ2_0": _tq2_0,
    "MXFP4": _mxfp4,
    "NVFP4": _nvfp4,
}
_SIZES = {kind.name: kind for kind in BLOCK_TYPES.values()}
