"""HQQ checkpoints as transformers saves them.

Of a layer: `W_q`, fields of runs of groups side by side, the first run in the highest bits: 1, 2, 4 or 8 bits in bytes,
or ten of 3 bits in an int32; `scale` and `zero`, one for each group; `shape`, `nbits`, `group_size`, `axis`, `packing`
and `compute_dtype`, small tensors, texts as bytes. Groups are runs of inputs (axis 1).
W = (q - zero) * scale in compute_dtype, rounded after each operation.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from entrollm.checkpoint.imported.formats import (
    ImportedMatrix,
    ImportedWeights,
    RawTensors,
    floats,
    group_scales,
    matrix_shape,
)
from entrollm.errors import FormatError, UnsupportedError
from entrollm.files.dtypes import DTYPES

# By packing: bits of a field, fields of an element, type of the element.
_PACKINGS = {
    "8bit_u8": (8, 1, "U8"),
    "4bit_u8": (4, 2, "U8"),
    "3bit_32": (3, 10, "I32"),
    "2bit_u8": (2, 4, "U8"),
    "1bit_u8": (1, 8, "U8"),
}
_COMPUTE_TYPES = {"torch.float16": "F16", "torch.bfloat16": "BF16", "torch.float32": "F32"}
# Everything that a layer saves, except its bias.
_SUFFIXES = frozenset(
    {"W_q", "scale", "zero", "shape", "nbits", "group_size", "axis", "packing", "unpack_view_dtype", "view_as_float"}
    | {"quant_scale", "quant_zero", "compute_dtype", "offload_meta", "encoded_state_dict", "stores_quant_config"}
    | {"channel_wise", "optimize", "round_zero"}
)


def recognise(quantization: Mapping[str, Any]) -> bool:
    """Whether a quantization_config is of this format."""
    return quantization.get("quant_method") == "hqq"


def matrices(quantization: Mapping[str, Any], tensors: RawTensors) -> Iterator[ImportedMatrix]:
    """The quantized matrices of a checkpoint; see `Format`."""
    for name in tensors.entries:
        layer = name.removesuffix("W_q")
        if layer != name:
            yield _Layer(layer, tensors).matrix()


class _Layer:
    """Reads the small tensors of a layer."""

    def __init__(self, name: str, tensors: RawTensors) -> None:
        self._name = name
        self._tensors = tensors

    def matrix(self) -> ImportedMatrix:
        """The quantized matrix; its tensors are checked against each other."""
        name, tensors = self._name, self._tensors
        if self._integers("axis", 1) != (1,):
            raise UnsupportedError(
                f"{name}axis: groups run down the columns; only axis 1, along the rows, is supported"
            )
        for option in ("quant_scale", "quant_zero"):
            if name + option in tensors.entries and self._integers(option, 1) != (0,):
                raise UnsupportedError(f"{name}{option}: scales that are quantized themselves are not supported")
        rows, columns = self._integers("shape", 2)
        if not (0 < rows < 2**31 and 0 < columns < 2**31):
            raise FormatError(f"{name}shape: {rows} x {columns} is not the shape of a matrix")
        size = self._integers("group_size", 1)[0] if name + "group_size" in tensors.entries else columns
        if not 0 < size <= columns or columns % size:
            raise UnsupportedError(f"{name}group_size: groups of {size} do not divide the {columns} columns")
        packing, compute_type = self._text("packing"), self._text("compute_dtype")
        if packing not in _PACKINGS or compute_type not in _COMPUTE_TYPES:
            raise UnsupportedError(
                f"{name}packing: {packing!r:.40} with compute_dtype {compute_type!r:.40} is not supported"
            )
        groups = rows * columns // size
        bits, fields, element = _PACKINGS[packing]
        packed_rows = math.ceil(groups / fields)
        if (groups % fields and element == "U8") or matrix_shape(tensors, name + "W_q", (element,)) != (
            packed_rows,
            size,
        ):
            raise FormatError(f"{name}W_q: expected {packed_rows} x {size} elements for {groups} groups of {bits} bits")
        read = functools.partial(self._read, (rows, columns), size, packing, _COMPUTE_TYPES[compute_type])
        sources = tuple(name + suffix for suffix in sorted(_SUFFIXES) if name + suffix in tensors.entries)
        return ImportedMatrix(name + "weight", (rows, columns), _COMPUTE_TYPES[compute_type], sources, read)

    def _read(self, shape: tuple[int, int], size: int, packing: str, compute_type: str) -> ImportedWeights:
        rows, columns = shape
        groups = rows * columns // size
        bits, fields, _ = _PACKINGS[packing]
        packed = self._tensors.array(self._name + "W_q")
        runs = [(packed >> (bits * (fields - 1 - i)) & ((1 << bits) - 1)).astype(np.uint8) for i in range(fields)]
        symbols = np.concatenate(runs)[:groups].reshape(rows, columns)
        arrays: dict[str, NDArray[Any]] = {}
        for part in ("scale", "zero"):
            with np.errstate(over="ignore"):  # values that overflow are refused below
                values = floats(self._tensors, self._name + part, (groups, 1)).astype(DTYPES[compute_type])
            if not np.isfinite(values.astype(np.float32)).all():
                raise FormatError(f"{self._name}{part}: it has a value that {compute_type} cannot hold")
            arrays["group_" + part] = values.reshape(rows, columns // size)
        form = {"size": size, "arithmetic": compute_type}
        return ImportedWeights(symbols, group_scales(form, arrays))

    def _integers(self, part: str, count: int) -> tuple[int, ...]:
        entry = self._tensors.entries.get(self._name + part)
        if entry is None or DTYPES[entry.dtype].kind not in "iu" or math.prod(entry.shape) != count:
            raise FormatError(f"{self._name}{part}: expected {count} integer(s), found {entry}")
        return tuple(int(value) for value in self._tensors.array(self._name + part).reshape(-1))

    def _text(self, part: str) -> str:
        entry = self._tensors.entries.get(self._name + part)
        if entry is None or entry.dtype != "U8" or entry.size_bytes > 40:
            raise FormatError(f"{self._name}{part}: expected a short text as bytes, found {entry}")
        return self._tensors.array(self._name + part).tobytes().decode("latin-1")
