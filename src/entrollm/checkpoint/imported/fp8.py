"""fp8 weights with scales, as compressed-tensors, FBGEMM, DeepSeek and transformers store them; see `scales`.

The bytes are kept as symbols, with the value table of their type. W = value * scale in float32, which is exact for
16-bit scales; runtimes round it to the type of the model.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import numpy as np

from entrollm.checkpoint.fp8 import BlockScales
from entrollm.checkpoint.imported.packed import PackedMatrix, RawTensors, StoredMatrix, group_scales
from entrollm.errors import FormatError
from entrollm.format.group_scales import BYTE_VALUES

DTYPE = "BF16"


def fp8_matrix(name: str, scale_name: str, tensors: RawTensors, scales: Callable[[], BlockScales]) -> PackedMatrix:
    """A scaled fp8 weight, a matrix of at least one element, as its bytes.

    Args:
        name, scale_name: the two tensors.
        tensors: where they are.
        scales: gives the scales their meaning, when the weight is read.
    """
    rows, columns = tensors.entries[name].shape
    read = functools.partial(_read, name, tensors, scales)
    return PackedMatrix(name, (rows, columns), DTYPE, (name, scale_name), read)


def _read(name: str, tensors: RawTensors, scales: Callable[[], BlockScales]) -> StoredMatrix:
    blocks, values = scales(), tensors.entries[name].dtype
    symbols = tensors.array(name).view(np.uint8)
    used = np.bincount(symbols.reshape(-1), minlength=256) > 0
    scale = np.repeat(blocks.scale, blocks.block_shape[0], axis=0)[: len(symbols)]
    if not (np.isfinite(BYTE_VALUES[values][used]).all() and np.isfinite(scale).all()):
        raise FormatError(f"tensor {name!r} has a weight or a scale that is not finite; weights must be finite")
    form = {"size": blocks.block_shape[1], "values": values}
    return StoredMatrix(symbols, group_scales(form, {"group_scale": scale}))
