"""Blocks of GGUF files whose weights are points of a codebook: IQ1, IQ2 and IQ3.

A point has eight values (IQ1, IQ2) or four (IQ3). gguf_codebooks.npz holds the points, which are part of the format:
ggml's `ggml-common.h` (llama.cpp, MIT licence) defines them. Those of IQ3_XXS are halved here.

Blocks have 256 weights. d is an f16, g a small scale, W = d * (2 g + 1) * value * a power of two:
- IQ2_XXS: d; for each 32 weights four bytes of points, then a u32 of four times 7 bits of signs, and g in 4 bits.
- IQ2_XS: d; for each 8 weights a u16 of a point (9 bits) and 7 bits of signs; g as 16 nibbles.
- IQ2_S: d; 32 bytes of points, 32 of signs, 8 with the highest two bits of points; g as 16 nibbles.
- IQ3_XXS: d; 64 bytes of points; for each 32 weights a u32 of signs and g, as in IQ2_XXS.
- IQ3_S: d; 64 bytes of points, 8 with their highest bits, 32 of signs; g as 8 nibbles.
- IQ1_S: d; 32 bytes of points; for each 32 weights a u16 with their highest three bits each, g in 3 bits, and the sign
  of 1/8 that is added to each value.
- IQ1_M: 32 bytes of points; for each a nibble with its highest three bits and the sign of 1/8; four u16, each with four
  g of 3 bits and 4 bits of d.

Seven bits of signs stand for eight, of which an even number is set.

Weights become integers with two levels of scales, as those of k-quants. Every product is exact in float32.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from importlib import resources
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from entrollm.checkpoint.imported.formats import group_scales
from entrollm.format.group_scales import GroupScales

Octets = NDArray[np.uint8]
_SUPER = 256
# IQ1's values are -1, 0 and 1 with 1/8 added or subtracted, and become multiples of it.
_EIGHTHS = 8
# The symbols that stand for 0: the largest values, so that none is negative.
_ZERO_OF_1, _ZERO_OF_2, _ZERO_OF_3_XXS, _ZERO_OF_3_S = _EIGHTHS + 1, 43, 31, 15


@functools.cache
def _points() -> Mapping[str, NDArray[np.int8]]:
    """The points of each codebook: int8 (points, 4 or 8)."""
    with (resources.files(__package__) / "gguf_codebooks.npz").open("rb") as stream, np.load(stream) as stored:
        return MappingProxyType({name: stored[name] for name in stored.files})


def iq2_xxs(blocks: Octets) -> tuple[Octets, GroupScales]:
    """Unpack: uint8 (rows, blocks, bytes) -> symbols of as many weights, and their scales."""
    words = _words(blocks[..., 2:], np.uint32).reshape(*blocks.shape[:2], 8, 2)
    chosen = np.ascontiguousarray(words[..., 0]).view(np.uint8)
    symbols = _signed("IQ2_XXS", _ZERO_OF_2, chosen, _even_signs(words[..., 1]))
    return symbols, _scales(blocks[..., :2], words[..., 1] >> 28, 32, _ZERO_OF_2, 1 / 8)


def iq2_xs(blocks: Octets) -> tuple[Octets, GroupScales]:
    """Unpack as iq2_xxs does."""
    words = _words(blocks[..., 2:66], np.uint16)
    symbols = _signed("IQ2_XS", _ZERO_OF_2, words & 511, _with_parity(words >> 9))
    return symbols, _scales(blocks[..., :2], _nibbles(blocks[..., 66:]), 16, _ZERO_OF_2, 1 / 8)


def iq2_s(blocks: Octets) -> tuple[Octets, GroupScales]:
    """Unpack as iq2_xxs does."""
    high = _fields(blocks[..., 66:74], 2)
    symbols = _signed("IQ2_S", _ZERO_OF_2, blocks[..., 2:34] | high << 8, blocks[..., 34:66])
    return symbols, _scales(blocks[..., :2], _nibbles(blocks[..., 74:]), 16, _ZERO_OF_2, 1 / 8)


def iq3_xxs(blocks: Octets) -> tuple[Octets, GroupScales]:
    """Unpack as iq2_xxs does."""
    words = _words(blocks[..., 66:], np.uint32)
    symbols = _signed("IQ3_XXS", _ZERO_OF_3_XXS, blocks[..., 2:66], _even_signs(words))
    return symbols, _scales(blocks[..., :2], words >> 28, 32, _ZERO_OF_3_XXS, 1 / 2)


def iq3_s(blocks: Octets) -> tuple[Octets, GroupScales]:
    """Unpack as iq2_xxs does."""
    high = _fields(blocks[..., 66:74], 1)
    symbols = _signed("IQ3_S", _ZERO_OF_3_S, blocks[..., 2:66] | high << 8, blocks[..., 74:106])
    return symbols, _scales(blocks[..., :2], _nibbles(blocks[..., 106:]), 32, _ZERO_OF_3_S, None)


def iq1_s(blocks: Octets) -> tuple[Octets, GroupScales]:
    """Unpack as iq2_xxs does."""
    words = _words(blocks[..., 34:], np.uint16)
    high = (words[..., None] >> np.arange(0, 12, 3, dtype=np.uint16) & 7).reshape(*words.shape[:2], 32)
    symbols = _shifted(blocks[..., 2:34] | high << 8, np.repeat(words >> 15, 4, axis=-1))
    return symbols, _scales(blocks[..., :2], words >> 12 & 7, 32, _ZERO_OF_1, 1 / _EIGHTHS)


def iq1_m(blocks: Octets) -> tuple[Octets, GroupScales]:
    """Unpack as iq2_xxs does."""
    high = _fields(blocks[..., 32:48], 4)
    symbols = _shifted(blocks[..., :32] | (high & 7) << 8, high >> 3)
    words = _words(blocks[..., 48:], np.uint16)
    small = (words[..., None] >> np.arange(0, 12, 3, dtype=np.uint16) & 7).reshape(*words.shape[:2], 16)
    outer = np.bitwise_or.reduce(words >> 12 << np.arange(0, 16, 4, dtype=np.uint16), axis=-1, keepdims=True)
    return symbols, _scales(outer.view(np.uint8), small, 16, _ZERO_OF_1, 1 / _EIGHTHS)


def _words(octets: Octets, dtype: type[np.unsignedinteger[Any]]) -> NDArray[Any]:
    """Bytes of blocks as unsigned integers."""
    return np.ascontiguousarray(octets).view(dtype)


def _fields(octets: Octets, bits: int) -> NDArray[np.uint16]:
    """The fields of bytes, lowest first, widened so that they can be shifted."""
    fields = octets[..., None] >> np.arange(0, 8, bits, dtype=np.uint8) & np.uint8((1 << bits) - 1)
    return fields.reshape(*octets.shape[:-1], -1).astype(np.uint16)


def _nibbles(octets: Octets) -> NDArray[np.uint16]:
    return _fields(octets, 4)


def _even_signs(words: NDArray[np.uint32]) -> Octets:
    """The signs of 32 weights in the lowest 28 bits of a word: bytes of eight weights each."""
    fields = words[..., None] >> np.arange(0, 28, 7, dtype=np.uint32) & 127
    return _with_parity(fields.reshape(*words.shape[:-1], -1))


def _with_parity(signs: NDArray[Any]) -> Octets:
    """Seven bits, and an eighth one that makes their number even."""
    folded = signs ^ signs >> 4
    folded ^= folded >> 2
    folded ^= folded >> 1
    whole: Octets = (signs | (folded & 1) << 7).astype(np.uint8)
    return whole


def _signed(codebook: str, zero: int, chosen: NDArray[Any], signs: Octets) -> Octets:
    """Points with signs as symbols.

    Args:
        codebook: its name.
        zero: the symbol that stands for 0.
        chosen: (rows, blocks, points).
        signs: (rows, blocks, bytes), a bit for each weight that is set where it is negative.
    """
    magnitudes = _points()[codebook][chosen].reshape(*chosen.shape[:2], -1)
    negative = np.unpackbits(signs, axis=-1, bitorder="little").reshape(magnitudes.shape).astype(np.bool_)
    symbols: Octets = (zero + np.where(negative, -magnitudes, magnitudes)).astype(np.uint8)
    return symbols


def _shifted(chosen: NDArray[Any], negative: NDArray[Any]) -> Octets:
    """Points of IQ1, each with 1/8 added or subtracted, in eighths, as symbols from 0 on."""
    shift = 1 - 2 * negative.astype(np.int8)
    values = _points()["IQ1_S"][chosen] * np.int8(_EIGHTHS) + shift[..., None] + np.int8(_ZERO_OF_1)
    symbols: Octets = values.astype(np.uint8).reshape(*chosen.shape[:2], -1)
    return symbols


def _scales(outer: Octets, small: NDArray[Any], size: int, zero: int, factor: float | None) -> GroupScales:
    """The scales d * (2 g + 1) of groups of `size` weights.

    Args:
        outer: the bytes of d, (rows, blocks, 2).
        small: g, (rows, blocks, groups).
        size: weights of a group.
        zero: the symbol that stands for 0.
        factor: multiplies all weights; None for 1.
    """
    rows = len(outer)
    arrays: dict[str, NDArray[Any]] = {
        "group_scale": (2 * small + 1).astype(np.uint8).reshape(rows, -1),
        "super_scale": np.ascontiguousarray(outer).view(np.float16)[..., 0],
    }
    return group_scales({"size": size, "super_size": _SUPER, "factor": factor}, arrays, zero)
