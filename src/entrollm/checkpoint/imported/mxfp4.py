"""MXFP4 experts of GPT-OSS.

Of a stack of experts: `<stack>_blocks` uint8 (experts, out, groups, 16), of which each byte has two neighbouring 4-bit
floats of a row, and `<stack>_scales` uint8 (experts, out, groups), exponents of the groups of 32 inputs.
W = value * 2^(exponent - 127), which is exact in bfloat16. The stack of the ordinary checkpoint holds the transposes.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from entrollm.checkpoint.imported.float4 import ZERO, half_powers, unpack_pairs
from entrollm.checkpoint.imported.formats import ImportedMatrix, ImportedWeights, RawTensors, group_scales
from entrollm.errors import FormatError
from entrollm.format import layout

_BLOCKS, _SCALES = "_blocks", "_scales"
_GROUP_BYTES = 16
_GROUP = 2 * _GROUP_BYTES


def recognise(quantization: Mapping[str, Any]) -> bool:
    """Whether a quantization_config is of this format."""
    return quantization.get("quant_method") == "mxfp4"


def matrices(quantization: Mapping[str, Any], tensors: RawTensors) -> Iterator[ImportedMatrix]:
    """The quantized matrices of a checkpoint, one for each expert; see `Format`."""
    for name in tensors.entries:
        stack = name.removesuffix(_BLOCKS)
        if stack == name:
            continue
        experts, rows, groups = _shape(stack, tensors)
        sources = (name, stack + _SCALES)
        for index in range(experts):
            read = functools.partial(_read, stack, index, tensors)
            member = layout.member_name(stack, index, is_transposed=True)
            yield ImportedMatrix(member, (rows, groups * _GROUP), "BF16", sources, read)


def _shape(stack: str, tensors: RawTensors) -> tuple[int, int, int]:
    """Experts, rows and groups."""
    blocks, scales = (tensors.entries.get(stack + part) for part in (_BLOCKS, _SCALES))
    if blocks is None or blocks.dtype != "U8" or len(blocks.shape) != 4 or 0 in blocks.shape:
        raise FormatError(f"{stack}{_BLOCKS}: expected U8 with four axes, found {blocks}")
    experts, rows, groups, octets = blocks.shape
    if octets != _GROUP_BYTES:
        raise FormatError(f"{stack}{_BLOCKS}: expected groups of {_GROUP_BYTES} bytes, found {list(blocks.shape)}")
    if scales is None or scales.dtype != "U8" or scales.shape != (experts, rows, groups):
        raise FormatError(f"{stack}{_SCALES}: expected U8 {[experts, rows, groups]}, found {scales}")
    return experts, rows, groups


def _read(stack: str, index: int, tensors: RawTensors) -> ImportedWeights:
    blocks = tensors.array(stack + _BLOCKS)[index]
    scale = half_powers(stack + _SCALES, tensors.array(stack + _SCALES)[index])
    symbols = unpack_pairs(blocks.reshape(len(blocks), -1))
    return ImportedWeights(np.ascontiguousarray(symbols), group_scales({"size": _GROUP}, {"group_scale": scale}, ZERO))
