"""AutoRound checkpoints: GPTQ's or AWQ's layout of integers, or layers of 4-bit floats.

`packing_format` says which. `auto_round:auto_gptq`, the default, is the first format of GPTQ, `auto_round` and
`auto_round:gptqmodel` the second; none needs `g_idx`. `auto_round:auto_awq` is AWQ's. `extra_config` has the bits of
single layers.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from entrollm.checkpoint.imported import awq, float4_layers, gptq
from entrollm.checkpoint.imported.expressions import check_expression
from entrollm.checkpoint.imported.formats import ImportedMatrix, RawTensors
from entrollm.errors import FormatError, UnsupportedError

_METHODS = ("auto-round", "intel/auto-round")
_FLOATS = ("mx_fp", "nv_fp")
_LEAST_FLOAT_BITS = 16
_ROTATION = ".hadamard_matrix"
# What AutoRound takes for a format that is not stated, or left to it.
_DEFAULT = "auto_round:auto_gptq"
_FIRST_FORMAT = (_DEFAULT, "auto_gptq", "auto")
_AWQ = ("auto_round:auto_awq", "auto_awq")
_SECOND_FORMAT = ("auto_round", "auto_round:exllamav2", "auto_round:tritonv2", "auto_round:gptqmodel")


def recognise(quantization: Mapping[str, Any]) -> bool:
    """Whether a quantization_config is of this format."""
    return quantization.get("quant_method") in _METHODS


def matrices(quantization: Mapping[str, Any], tensors: RawTensors) -> Iterator[ImportedMatrix]:
    """The quantized matrices of a checkpoint; see `Format`."""
    kind, bits = quantization.get("data_type", "int"), quantization.get("bits")
    for name in tensors.entries:
        if name.endswith(_ROTATION):
            raise UnsupportedError(
                f"{name}: AutoRound weights with a rotation of their inputs (a tensor *{_ROTATION}) are not supported"
            )
    if bits == 4 and isinstance(kind, str) and kind.startswith(_FLOATS):
        return float4_layers.layers(tensors)
    if kind != "int":
        raise UnsupportedError(
            f"config.json: AutoRound weights of {bits!r:.20} bits and data_type {kind!r:.40}; supported are int, and "
            "mx_fp and nv_fp of 4 bits"
        )
    packing = quantization.get("packing_format", quantization.get("backend", _DEFAULT))
    if not isinstance(packing, str):
        raise FormatError(f"config.json: packing_format is {packing!r:.40}, expected a string")
    if packing in _AWQ:
        return awq.matrices({"bits": bits}, tensors)
    if packing in _SECOND_FORMAT:
        layout = "gptq_v2"
    elif packing in _FIRST_FORMAT:
        layout = "gptq"
    else:
        known = ", ".join((*_FIRST_FORMAT, *_SECOND_FORMAT, *_AWQ))
        raise UnsupportedError(
            f"config.json: AutoRound weights in the packing_format {packing!r:.40}, whose layout is not known; "
            f"expected one of {known}"
        )
    return gptq.matrices({"bits": bits, "checkpoint_format": layout, "dynamic": _exceptions(quantization)}, tensors)


def _exceptions(quantization: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The layers of other bits, as GPTQ's `dynamic` has them."""
    extra = quantization.get("extra_config") or {}
    if not isinstance(extra, dict) or not all(isinstance(options, dict) for options in extra.values()):
        raise FormatError(f"config.json: extra_config is {extra!r:.80}, expected an object of objects")
    found = {}
    for name, options in extra.items():
        bits = options.get("bits")
        if bits is not None and not (isinstance(bits, int) and bits >= _LEAST_FLOAT_BITS):
            # A name is taken as it is, or as an expression for whole names.
            expression = f"(?:{re.escape(name)}|{name})$"
            check_expression(expression, f"extra_config {name!r:.80}")
            found[expression] = {"bits": bits}
    return found
