"""GPTQ checkpoints as AutoGPTQ and gptqmodel write them.

Of a layer with `in` inputs and `out` outputs: `qweight` int32 (in * bits / 32, out), fields packed down the columns;
`qzeros` int32 (groups, out * bits / 32), packed along the rows; `scales` (groups, out); `g_idx` int32 (in,), the group
of each input, which checkpoints without activation order may lack. The first format ("gptq") stores zeros less one;
gptqmodel adds it back to whole words, and to fields modulo 8 where they have 3 bits. The second ("gptq_v2") stores
them as they are. W = (q - zero) * scale, rounded to the type of the scales.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from entrollm.checkpoint.imported.expressions import check_expression, first_matches
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
    sort_groups,
    unpack_bits,
)
from entrollm.errors import FormatError, UnsupportedError

_BITS = (2, 3, 4, 8)
_LAYOUTS = ("gptq", "gptq_v2")
# One in every field of a word.
_ONES = {2: 0x55555555, 4: 0x11111111, 8: 0x01010101}


def recognise(quantization: Mapping[str, Any]) -> bool:
    """Whether a quantization_config is of this format."""
    return is_method(quantization, "gptq")


def matrices(quantization: Mapping[str, Any], tensors: RawTensors) -> Iterator[ImportedMatrix]:
    """The quantized matrices of a checkpoint; see `Format`."""
    layout = layout_option(quantization, ("checkpoint_format", "format"), _LAYOUTS)
    if quantization.get("is_marlin_format", False):
        raise UnsupportedError(f"config.json: GPTQ weights in Marlin's layout; supported are {_LAYOUTS}")
    bits = integer_option(quantization, "bits", _BITS)
    dynamic = _dynamic(quantization)
    layers = [name.removesuffix("qweight") for name in tensors.entries if name.endswith("qweight")]
    widths = _bits_of([layer.rstrip(".") for layer in layers], bits, dynamic)
    for layer, width in zip(layers, widths, strict=True):
        yield _matrix(layer, width, layout == "gptq", tensors)


def _dynamic(quantization: Mapping[str, Any]) -> dict[str, Mapping[str, Any] | None]:
    """Expressions for names of layers, with the options that the layers have instead, or None for unquantized ones."""
    rules: dict[str, Mapping[str, Any] | None] = {}
    dynamic = quantization.get("dynamic") or {}
    if not isinstance(dynamic, dict):
        raise FormatError(f"config.json: quantization_config has dynamic {dynamic!r:.80}, expected an object")
    for key, options in dynamic.items():
        if not isinstance(options, dict):
            raise FormatError(f"config.json: dynamic {key!r:.80} of quantization_config is not an object")
        expression = key.removeprefix("-:").removeprefix("+:")
        check_expression(expression, f"dynamic {key!r:.80}")
        rules.setdefault(expression, None if key.startswith("-:") else options)
    return rules


def _bits_of(layers: Sequence[str], bits: int, dynamic: Mapping[str, Mapping[str, Any] | None]) -> list[int]:
    """The bits of layers: those of the first expression that matches the beginning of a name, or the common ones."""
    found = []
    options = list(dynamic.values())
    for layer, number in zip(layers, first_matches(list(dynamic), layers), strict=True):
        own = {} if number is None else options[number]
        if own is None:
            raise FormatError(f"{layer}.qweight: the layer is quantized, and dynamic in config.json says it is not")
        found.append(integer_option({"bits": bits, **own}, "bits", _BITS))
    return found


def _matrix(layer: str, bits: int, is_less_one: bool, tensors: RawTensors) -> ImportedMatrix:
    packed_columns, rows = matrix_shape(tensors, layer + "qweight", ("I32",))
    index = tensors.entries.get(layer + "g_idx")
    if index is None:
        columns = packed_columns * 32 // bits
    else:
        if index.dtype not in ("I32", "I64") or len(index.shape) != 1 or index.shape[0] == 0:
            raise FormatError(f"{layer}g_idx: expected one axis of I32, found {index.dtype} {list(index.shape)}")
        columns = index.shape[0]
    if packed_columns * 32 != columns * bits:
        raise FormatError(
            f"{layer}qweight: {packed_columns} words do not hold {columns} weights of {bits} bits in each column"
        )
    groups, width = matrix_shape(tensors, layer + "qzeros", ("I32",))
    if width * 32 != rows * bits:
        raise FormatError(f"{layer}qzeros: {width} words do not hold {rows} zeros of {bits} bits in each row")
    if groups > columns:
        raise FormatError(f"{layer}qzeros: {groups} groups of {columns} columns")
    if matrix_shape(tensors, layer + "scales", FLOAT_TYPES) != (groups, rows):
        raise FormatError(f"{layer}scales: expected shape {[groups, rows]}")
    suffixes = ("qweight", "qzeros", "scales", *(["g_idx"] if index else []))
    return ImportedMatrix(
        name=layer + "weight",
        shape=(rows, columns),
        dtype=tensors.entries[layer + "scales"].dtype,
        sources=tuple(layer + suffix for suffix in suffixes),
        read=functools.partial(_read, layer, bits, is_less_one, (rows, columns), tensors),
    )


def _read(layer: str, bits: int, is_less_one: bool, shape: tuple[int, int], tensors: RawTensors) -> ImportedWeights:
    rows, columns = shape
    symbols = unpack_bits(tensors.array(layer + "qweight").T, bits, columns)
    scale = floats(tensors, layer + "scales", tensors.entries[layer + "scales"].shape).T
    groups = scale.shape[1]
    if layer + "g_idx" in tensors.entries:
        size, order = sort_groups(layer + "g_idx", tensors.array(layer + "g_idx"), groups)
    else:
        size, order = -(-columns // groups), None
        if -(-columns // size) != groups:
            raise FormatError(f"{layer}scales: {columns} columns do not make {groups} groups of one size")
    arrays: dict[str, NDArray[Any]] = {"group_scale": scale}
    arrays["group_zero"] = _zeros(tensors.array(layer + "qzeros"), bits, rows, is_less_one).T
    if order is not None:
        symbols = symbols[:, order]
        arrays["column_order"] = order
    form = {"size": size, "arithmetic": tensors.entries[layer + "scales"].dtype}
    return ImportedWeights(np.ascontiguousarray(symbols), group_scales(form, arrays))


def _zeros(words: NDArray[Any], bits: int, rows: int, is_less_one: bool) -> NDArray[np.uint8]:
    """uint8, shape (groups, rows)."""
    if is_less_one and bits in _ONES:
        words = words.view(np.uint32) + np.uint32(_ONES[bits])  # wraps around, as the sum of tensors does
    zeros = unpack_bits(words, bits, rows)
    if is_less_one and bits not in _ONES:
        zeros = (zeros + 1) & np.uint8((1 << bits) - 1)
    return zeros
