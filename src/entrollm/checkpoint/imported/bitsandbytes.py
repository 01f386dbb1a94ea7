"""8-bit checkpoints of bitsandbytes, as transformers saves them.

Of a layer: `weight` int8 (out, in), `SCB` F32 (out,), the largest magnitude of each row, and `weight_format`.
W = (q * SCB) * (1 / 127) in float32, rounded after each product. Outliers, which bitsandbytes multiplies in half
precision, are activations; all weights are in these tensors.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from entrollm.checkpoint.imported.formats import (
    ImportedMatrix,
    ImportedWeights,
    RawTensors,
    floats,
    group_scales,
    matrix_shape,
)
from entrollm.errors import FormatError, UnsupportedError

_INVERSE_127 = float(np.float32(7.874015718698502e-3))
_ROW_FORMAT = 0


def recognise(quantization: Mapping[str, Any]) -> bool:
    """Whether a quantization_config is of this format."""
    return quantization.get("quant_method") == "bitsandbytes"


def matrices(quantization: Mapping[str, Any], tensors: RawTensors) -> Iterator[ImportedMatrix]:
    """The quantized matrices of a checkpoint; see `Format`."""
    if quantization.get("load_in_4bit") or not quantization.get("load_in_8bit"):
        raise UnsupportedError(
            "config.json: 4-bit bitsandbytes weights lie on a grid of uneven steps; only 8-bit weights are supported"
        )
    for name in tensors.entries:
        layer = name.removesuffix("SCB")
        if layer == name or not layer.endswith("."):
            continue
        rows, columns = matrix_shape(tensors, layer + "weight", ("I8",))
        _check_format(layer, tensors)
        sources = tuple(layer + s for s in ("weight", "SCB", "weight_format") if layer + s in tensors.entries)
        read = functools.partial(_read, layer, rows, columns, tensors)
        yield ImportedMatrix(layer + "weight", (rows, columns), "F32", sources, read)


def _check_format(layer: str, tensors: RawTensors) -> None:
    """Refuse the element orders that old versions wrote for their kernels."""
    if layer + "weight_format" not in tensors.entries:
        return
    stored = tensors.array(layer + "weight_format")
    if stored.size != 1 or stored.reshape(-1)[0] != _ROW_FORMAT:
        raise UnsupportedError(
            f"{layer}weight_format: {stored.tolist()}; only weights in rows, format 0, are supported"
        )


def _read(layer: str, rows: int, columns: int, tensors: RawTensors) -> ImportedWeights:
    scale = floats(tensors, layer + "SCB", (rows,))
    if scale.dtype != np.float32:
        raise FormatError(f"{layer}SCB: expected F32, found {scale.dtype}")
    symbols = tensors.array(layer + "weight").view(np.uint8) ^ np.uint8(128)  # int8 plus 128
    form = {"size": columns, "factor": _INVERSE_127}
    return ImportedWeights(symbols, group_scales(form, {"group_scale": scale.reshape(rows, 1)}, zero=128))
