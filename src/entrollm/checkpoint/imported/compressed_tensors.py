"""Integer checkpoints of compressed-tensors: pack-quantized, int-quantized and naive-quantized.

Of a layer, packed: `weight_packed` int32 (out, ceil(in * bits / 32)), fields along the rows, each q + 2^(bits - 1);
`weight_shape`; `weight_zero_point` int32, packed down the columns in the same way, of asymmetric layers. Not packed:
`weight` int8 (out, in) and `weight_zero_point` int8. `weight_scale` has one number, one for each output, or one for
each output and group of inputs; `weight_g_idx` is the group of each input where they are not in order.
W = (q - zero) * scale, rounded to the type of the scales. Scales of activations are not needed and not kept.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from entrollm.checkpoint.imported.formats import (
    FLOAT_TYPES,
    ImportedMatrix,
    ImportedWeights,
    RawTensors,
    floats,
    group_scales,
    matrix_shape,
    sort_groups,
    unpack_bits,
)
from entrollm.errors import FormatError, UnsupportedError

_FORMATS = ("pack-quantized", "int-quantized", "naive-quantized")
_SCALE, _ZERO, _INDEX, _SHAPE = "weight_scale", "weight_zero_point", "weight_g_idx", "weight_shape"
_ACTIVATIONS = ("input_scale", "input_zero_point", "output_scale", "output_zero_point")
_MAX_BITS = 8


def recognise(quantization: Mapping[str, Any]) -> bool:
    """Whether a quantization_config is of this format."""
    if quantization.get("quant_method") != "compressed-tensors" or quantization.get("format") not in _FORMATS:
        return False
    groups = quantization.get("config_groups")
    schemes = [g.get("weights") for g in groups.values() if isinstance(g, dict)] if isinstance(groups, dict) else []
    return bool(schemes) and all(isinstance(scheme, dict) and scheme.get("type") == "int" for scheme in schemes)


def matrices(quantization: Mapping[str, Any], tensors: RawTensors) -> Iterator[ImportedMatrix]:
    """The quantized matrices of a checkpoint; see `Format`."""
    sparsity = quantization.get("sparsity_config") or {}
    if not isinstance(sparsity, dict) or sparsity.get("format", "dense") != "dense":
        raise UnsupportedError(
            "config.json: compressed-tensors weights with a sparsity_config; only dense weights are supported"
        )
    for name, entry in tensors.entries.items():
        layer, dot, part = name.rpartition(".")
        layer += dot
        if part == "weight_packed":
            yield _matrix(layer, part, _packed_shape(layer, tensors), tensors)
        elif part == "weight" and entry.dtype == "I8":
            yield _matrix(layer, part, matrix_shape(tensors, name, ("I8",)), tensors)


def _packed_shape(layer: str, tensors: RawTensors) -> tuple[int, int]:
    """The shape that `weight_shape` states, checked against the size of `weight_packed`."""
    rows, words = matrix_shape(tensors, layer + "weight_packed", ("I32",))
    entry = tensors.entries.get(layer + _SHAPE)
    if entry is None or entry.dtype not in ("I32", "I64") or entry.shape != (2,):
        raise FormatError(f"{layer}{_SHAPE}: expected two integers, found {entry}")
    stated = tuple(int(length) for length in tensors.array(layer + _SHAPE))
    if stated[0] != rows or not words * 4 <= stated[1] <= words * 32:
        raise FormatError(f"{layer}weight_packed: {rows} rows of {words} words cannot hold the shape {list(stated)}")
    _bits(layer, stated[1], words)
    return rows, stated[1]


def _bits(layer: str, columns: int, words: int) -> int:
    """The bits of a field; layers of one checkpoint may differ."""
    fitting = [bits for bits in range(1, _MAX_BITS + 1) if math.ceil(columns * bits / 32) == words]
    if len(fitting) != 1:
        raise FormatError(f"{layer}weight_packed: {words} words do not hold {columns} weights of equal bits")
    return fitting[0]


def _matrix(layer: str, part: str, shape: tuple[int, int], tensors: RawTensors) -> ImportedMatrix:
    scale = tensors.entries.get(layer + _SCALE)
    if scale is None or scale.dtype not in FLOAT_TYPES or not _fits(scale.shape, shape):
        raise FormatError(
            f"{layer}{_SCALE}: expected one scale, one for each of {shape[0]} rows, or one for each row and group, "
            f"found {scale}"
        )
    own = (part, _SCALE, _ZERO, _INDEX, _SHAPE, *_ACTIVATIONS)
    return ImportedMatrix(
        name=layer + "weight",
        shape=shape,
        dtype=scale.dtype,
        sources=tuple(layer + suffix for suffix in own if layer + suffix in tensors.entries),
        read=functools.partial(_read, layer, part, shape, tensors),
    )


def _fits(scale: tuple[int, ...], shape: tuple[int, int]) -> bool:
    """Whether there is one scale, one for each row, or one for each row and each of some groups of equal size."""
    rows, columns = shape
    if scale in ((), (1,), (1, 1), (rows,)):
        return True
    return len(scale) == 2 and scale[0] == rows and 0 < scale[1] <= columns and columns % scale[1] == 0


def _read(layer: str, part: str, shape: tuple[int, int], tensors: RawTensors) -> ImportedWeights:
    rows, columns = shape
    entry = tensors.entries[layer + _SCALE]
    scale = floats(tensors, layer + _SCALE, entry.shape)
    scale = np.broadcast_to(scale.reshape(rows if scale.size >= rows else 1, -1), (rows, max(1, scale.size // rows)))
    groups = scale.shape[1]
    stored = tensors.array(layer + part)
    arrays: dict[str, NDArray[Any]] = {"group_scale": scale}
    zero = None
    if part == "weight":
        symbols, zero = stored.view(np.uint8) ^ np.uint8(128), 128  # int8 plus 128
    else:
        bits = _bits(layer, columns, stored.shape[1])
        symbols, zero = unpack_bits(stored, bits, columns), 1 << (bits - 1)
    if layer + _ZERO in tensors.entries:
        arrays["group_zero"] = _zeros(layer, 8 if part == "weight" else bits, (rows, groups), tensors)
        zero = None
    size = columns // groups
    if layer + _INDEX in tensors.entries and groups > 1:
        index = tensors.array(layer + _INDEX)
        if index.dtype.kind != "i" or index.shape != (columns,):
            raise FormatError(f"{layer}{_INDEX}: expected {columns} integers, found {tensors.entries[layer + _INDEX]}")
        # If all of them are -1, the columns are in order.
        if (index != -1).any():
            size, order = sort_groups(layer + _INDEX, index, groups)
            if order is not None:
                symbols = symbols[:, order]
                arrays["column_order"] = order
    form = {"size": size, "arithmetic": entry.dtype}
    return ImportedWeights(np.ascontiguousarray(symbols), group_scales(form, arrays, zero))


def _zeros(layer: str, bits: int, shape: tuple[int, int], tensors: RawTensors) -> NDArray[np.uint8]:
    """The symbols that stand for weight 0, uint8 (rows, groups)."""
    rows, groups = shape
    entry, array = tensors.entries[layer + _ZERO], tensors.array(layer + _ZERO)
    if entry.dtype == "I32" and entry.shape == (math.ceil(rows * bits / 32), groups):
        return unpack_bits(array.T, bits, rows).T
    if entry.dtype == "I8" and array.size in (1, rows * groups):
        offset = np.int16(1 << (bits - 1))
        shifted = array.astype(np.int16) + offset
        if shifted.min() < 0 or shifted.max() > 255:
            raise FormatError(f"{layer}{_ZERO}: a zero is out of range")
        return np.broadcast_to(shifted.astype(np.uint8).reshape(-1, groups if array.size > 1 else 1), shape)
    raise FormatError(f"{layer}{_ZERO}: expected {rows} x {groups} zeros, packed or as I8, found {entry}")
