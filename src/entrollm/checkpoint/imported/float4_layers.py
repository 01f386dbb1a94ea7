"""Linear layers of 4-bit floats: NVFP4 and MXFP4 of compressed-tensors, AutoRound, ModelOpt and Quark.

Of a layer: `weight_packed` (compressed-tensors, AutoRound) or `weight` (ModelOpt, Quark), uint8 (out, in / 2), two
neighbouring inputs in a byte, and `weight_scale` (out, groups). MXFP4 has groups of 32 inputs and exponents as uint8 or
F8_E8M0; W = value * 2^(exponent - 127). NVFP4 has groups of 16, scales in F8_E4M3, and one float32 that divides these
(`weight_global_scale`) or multiplies them (`weight_scale_2`); W = value * scale in float32, which runtimes round to the
type of the model. Scales of activations are not needed and not kept.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from entrollm.checkpoint.imported.float4 import ZERO, half_powers, unpack_pairs
from entrollm.checkpoint.imported.formats import (
    ImportedMatrix,
    ImportedWeights,
    RawTensors,
    group_scales,
    matrix_shape,
)
from entrollm.errors import FormatError, UnsupportedError
from entrollm.format.group_scales import BYTE_VALUES

_FORMATS = ("nvfp4-pack-quantized", "mxfp4-pack-quantized")
_ALGORITHMS = ("NVFP4", "MXFP4")
_SCALE, _DIVISOR, _FACTOR = "weight_scale", "weight_global_scale", "weight_scale_2"
_EXPONENTS = ("U8", "F8_E8M0")
_GROUPS = {**dict.fromkeys(_EXPONENTS, 32), "F8_E4M3": 16}
_ACTIVATIONS = ("input_scale", "input_global_scale", "output_scale", "k_scale", "v_scale")
# What changes a weight or its input in a way that is not read.
_FOREIGN = ("weight_zero_point", "weight_g_idx", "pre_quant_scale")


def recognise(quantization: Mapping[str, Any]) -> bool:
    """Whether a quantization_config is of this format."""
    method = quantization.get("quant_method")
    if method == "compressed-tensors":
        return quantization.get("format") in _FORMATS
    if method == "modelopt":
        return quantization.get("quant_algo") in _ALGORITHMS
    if method == "quark":
        weight = quark_weight(quantization)
        return weight.get("dtype") == "fp4" and weight.get("scale_format") == "e8m0" and weight.get("group_size") == 32
    return False


def quark_weight(quantization: Mapping[str, Any]) -> Mapping[str, Any]:
    """How Quark's description says that all weights are quantized; empty if layers differ or it does not say."""
    common = quantization.get("global_quant_config")
    weight = common.get("weight") if isinstance(common, dict) else None
    differs = any(quantization.get(key) for key in ("layer_quant_config", "layer_type_quant_config"))
    return weight if isinstance(weight, dict) and not differs else {}


def matrices(quantization: Mapping[str, Any], tensors: RawTensors) -> Iterator[ImportedMatrix]:
    """The quantized matrices of a checkpoint; see `Format`."""
    return layers(tensors)


def layers(tensors: RawTensors) -> Iterator[ImportedMatrix]:
    """The matrices of 4-bit floats."""
    for name, entry in tensors.entries.items():
        layer, dot, part = name.rpartition(".")
        if part in ("weight_packed", "weight") and entry.dtype == "U8":
            yield _matrix(layer + dot, part, tensors)


def _matrix(layer: str, part: str, tensors: RawTensors) -> ImportedMatrix:
    rows, octets = matrix_shape(tensors, layer + part, ("U8",))
    columns = 2 * octets
    _, groups = matrix_shape(tensors, layer + _SCALE, tuple(_GROUPS))
    scale = tensors.entries[layer + _SCALE]
    if scale.shape != (rows, groups) or groups * _GROUPS[scale.dtype] != columns:
        raise FormatError(
            f"{layer}{_SCALE}: expected one scale of type {scale.dtype} for each of {rows} rows and each "
            f"{_GROUPS[scale.dtype]} of {columns} columns, found {list(scale.shape)}"
        )
    if scale.dtype in _EXPONENTS:
        for whole in (_DIVISOR, _FACTOR):
            if layer + whole in tensors.entries:
                raise UnsupportedError(
                    f"{layer}{whole}: expected no such tensor beside exponents ({layer}{_SCALE} is {scale.dtype}), and "
                    "how the two go together is not known"
                )
    for foreign in _FOREIGN:
        if layer + foreign in tensors.entries:
            raise UnsupportedError(f"{layer}{foreign}: 4-bit floats with a {foreign} are not supported")
    own = (part, _SCALE, _DIVISOR, _FACTOR, *_ACTIVATIONS)
    return ImportedMatrix(
        name=layer + "weight",
        shape=(rows, columns),
        dtype="BF16",
        sources=tuple(layer + suffix for suffix in own if layer + suffix in tensors.entries),
        read=functools.partial(_read, layer, part, tensors),
    )


def _read(layer: str, part: str, tensors: RawTensors) -> ImportedWeights:
    stored = tensors.array(layer + _SCALE)
    dtype = tensors.entries[layer + _SCALE].dtype
    if dtype in _EXPONENTS:
        scale = half_powers(layer + _SCALE, stored.view(np.uint8))
    else:
        scale = _floats(layer, BYTE_VALUES[dtype][stored.view(np.uint8)], tensors)
    symbols = unpack_pairs(tensors.array(layer + part))
    arrays = {"group_scale": scale}
    return ImportedWeights(np.ascontiguousarray(symbols), group_scales({"size": _GROUPS[dtype]}, arrays, ZERO))


def _floats(layer: str, scale: NDArray[np.float32], tensors: RawTensors) -> NDArray[np.float32]:
    """Half of the scales times the number of the whole matrix."""
    found = [suffix for suffix in (_DIVISOR, _FACTOR) if layer + suffix in tensors.entries]
    if len(found) != 1:
        raise FormatError(
            f"{layer}{_SCALE}: it needs either {_DIVISOR} or {_FACTOR}, found {' and '.join(found) or 'none'}"
        )
    entry = tensors.entries[layer + found[0]]
    if entry.dtype != "F32" or entry.shape not in ((), (1,)):
        raise FormatError(f"{layer}{found[0]}: expected one number of type F32, found {entry}")
    whole = tensors.array(layer + found[0]).reshape(())
    with np.errstate(divide="ignore", over="ignore", invalid="ignore"):  # refused below
        scales: NDArray[np.float32] = (scale / whole if found[0] == _DIVISOR else scale * whole) * np.float32(0.5)
    # A weight is at most 12 times as large.
    if not (np.abs(scales) < np.finfo(np.float32).max / 12).all():
        raise FormatError(f"{layer}{_SCALE}: a scale is not finite, or too large for float32")
    if (scales == 0)[scale != 0].any():
        raise FormatError(
            f"{layer}{found[0]}: it is {float(whole):g}, which makes scales zero; the file is damaged, fetch it again"
        )
    return scales
