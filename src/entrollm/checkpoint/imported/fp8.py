"""fp8 weights with scales, as compressed-tensors, FBGEMM, DeepSeek and transformers store them; see `checkpoint.fp8`.

The bytes become symbols. W = value * scale in float32, where value is the number that the byte stands for; this is
exact for 16-bit scales. Runtimes round it to the type of the model.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import numpy as np

from entrollm.checkpoint.fp8 import BlockScales
from entrollm.checkpoint.imported.formats import ImportedMatrix, ImportedWeights, RawTensors, group_scales
from entrollm.errors import FormatError
from entrollm.format.group_scales import BYTE_VALUES

DTYPE = "BF16"


def fp8_matrix(name: str, scale_name: str, tensors: RawTensors, scales: Callable[[], BlockScales]) -> ImportedMatrix:
    """An fp8 weight with scales, a matrix of at least one element, whose bytes are taken over.

    Args:
        name, scale_name: the weight and its scales.
        tensors: the checkpoint that has them.
        scales: reads the scales; called when the weight is read.
    """
    rows, columns = tensors.entries[name].shape
    read = functools.partial(_read, name, tensors, scales)
    return ImportedMatrix(name, (rows, columns), DTYPE, (name, scale_name), read)


def _read(name: str, tensors: RawTensors, scales: Callable[[], BlockScales]) -> ImportedWeights:
    blocks, values = scales(), tensors.entries[name].dtype
    symbols = tensors.array(name).view(np.uint8)
    used = np.bincount(symbols.reshape(-1), minlength=256) > 0
    scale = np.repeat(blocks.scale, blocks.block_shape[0], axis=0)[: len(symbols)]
    if not (np.isfinite(BYTE_VALUES[values][used]).all() and np.isfinite(scale).all()):
        raise FormatError(f"tensor {name!r} has a weight or a scale that is not finite; weights must be finite")
    form = {"size": blocks.block_shape[1], "values": values}
    return ImportedWeights(symbols, group_scales(form, {"group_scale": scale}))
