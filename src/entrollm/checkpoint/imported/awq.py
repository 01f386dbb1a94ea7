"""AWQ checkpoints in AutoAWQ's "gemm" layout.

Of a layer with `in` inputs and `out` outputs: `qweight` int32 (in, out / 8) and `qzeros` int32 (groups, out / 8), eight
4-bit fields along the rows in the order 0 2 4 6 1 3 5 7; `scales` (groups, out). Groups are runs of inputs.
W = (q - zero) * scale, rounded to the type of the scales.
"""

from __future__ import annotations

import functools
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
    integer_option,
    is_method,
    layout_option,
    matrix_shape,
    unpack_bits,
)
from entrollm.errors import FormatError

_FIELDS = 8
# The output that each field of a word belongs to, and the field of each output.
_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
_FIELD_OF_OUTPUT = np.argsort(_ORDER)


def recognise(quantization: Mapping[str, Any]) -> bool:
    """Whether a quantization_config is of this format."""
    return is_method(quantization, "awq")


def matrices(quantization: Mapping[str, Any], tensors: RawTensors) -> Iterator[ImportedMatrix]:
    """The quantized matrices of a checkpoint; see `Format`."""
    layout_option(quantization, ("version", "checkpoint_format", "format"), ("gemm",))
    integer_option(quantization, "bits", (4,))
    for name in tensors.entries:
        layer = name.removesuffix("qweight")
        if layer != name:
            yield _matrix(layer, tensors)


def _matrix(layer: str, tensors: RawTensors) -> ImportedMatrix:
    columns, width = matrix_shape(tensors, layer + "qweight", ("I32",))
    rows = width * _FIELDS
    groups, zero_width = matrix_shape(tensors, layer + "qzeros", ("I32",))
    if zero_width != width:
        raise FormatError(f"{layer}qzeros: {zero_width} words in each row, expected {width}")
    if columns % groups:
        raise FormatError(f"{layer}qzeros: {columns} columns do not make {groups} groups of one size")
    if matrix_shape(tensors, layer + "scales", FLOAT_TYPES) != (groups, rows):
        raise FormatError(f"{layer}scales: expected shape {[groups, rows]}")
    return ImportedMatrix(
        name=layer + "weight",
        shape=(rows, columns),
        dtype=tensors.entries[layer + "scales"].dtype,
        sources=tuple(layer + part for part in ("qweight", "qzeros", "scales")),
        read=functools.partial(_read, layer, (groups, rows), tensors),
    )


def _read(layer: str, shape: tuple[int, int], tensors: RawTensors) -> ImportedWeights:
    scale = floats(tensors, layer + "scales", shape)
    symbols = _unpack(tensors.array(layer + "qweight"))
    arrays = {"group_scale": scale.T, "group_zero": _unpack(tensors.array(layer + "qzeros")).T}
    form = {"size": len(symbols) // shape[0], "arithmetic": tensors.entries[layer + "scales"].dtype}
    return ImportedWeights(np.ascontiguousarray(symbols.T), group_scales(form, arrays))


def _unpack(words: NDArray[Any]) -> NDArray[np.uint8]:
    """uint8, shape (n, outputs)."""
    fields = unpack_bits(words, 4, words.shape[1] * _FIELDS).reshape(len(words), -1, _FIELDS)
    return fields[:, :, _FIELD_OF_OUTPUT].reshape(len(words), -1)
