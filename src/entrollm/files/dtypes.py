"""The element types of safetensors files, and their conversion to float32."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from entrollm.errors import FormatError

Float32 = NDArray[np.float32]

DTYPES: Mapping[str, np.dtype[Any]] = MappingProxyType(
    {
        "BOOL": np.dtype(np.bool_),
        "U8": np.dtype(np.uint8),
        "I8": np.dtype(np.int8),
        "U16": np.dtype(np.uint16),
        "I16": np.dtype(np.int16),
        "U32": np.dtype(np.uint32),
        "I32": np.dtype(np.int32),
        "U64": np.dtype(np.uint64),
        "I64": np.dtype(np.int64),
        "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
        "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
        "F8_E8M0": np.dtype(ml_dtypes.float8_e8m0fnu),
        "F16": np.dtype(np.float16),
        "BF16": np.dtype(ml_dtypes.bfloat16),
        "F32": np.dtype(np.float32),
        "F64": np.dtype(np.float64),
    }
)

_FLOAT_TYPES = frozenset(
    np.dtype(dtype) for dtype in (np.float16, ml_dtypes.bfloat16, np.float32, np.float64, ml_dtypes.float8_e8m0fnu)
)
# All 256 values of each fp8 type; looking them up is four times as fast as the cast of ml_dtypes.
_FP8_VALUES = {
    np.dtype(dtype): np.arange(256, dtype=np.uint8).view(dtype).astype(np.float32)
    for dtype in (ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2)
}


def check_finite(name: str, values: NDArray[Any]) -> None:
    """Check that a tensor which is stored in its own type has no NaN, and no infinity unless it is a mask.

    Args:
        name: the tensor; a name that ends in "mask" may hold infinities.
        values: of any type; only floats are looked at.
    Raises:
        FormatError: there is one.
    """
    if values.dtype not in _FLOAT_TYPES and values.dtype not in _FP8_VALUES:
        return
    is_finite = np.isfinite(values)
    if name.endswith("mask"):
        is_finite |= np.isinf(values)
    if not is_finite.all():
        place = tuple(int(axis) for axis in np.argwhere(~is_finite)[0])
        raise FormatError(
            f"{name}: the value at {place} is {float(values[place])}; a model with such values computes nothing, use "
            "another checkpoint"
        )


def to_float32(values: NDArray[Any]) -> Float32:
    """Convert an array of any floating type of a checkpoint to a new float32 array; exact, except from float64.

    Numbers of float64 beyond the range of float32 become infinite.

    Raises:
        TypeError: the values are not of a floating type.
    """
    table = _FP8_VALUES.get(values.dtype)
    if table is not None:
        return np.take(table, values.view(np.uint8))
    if values.dtype not in _FLOAT_TYPES:
        raise TypeError(f"expected a floating type, found {values.dtype}")
    with np.errstate(over="ignore"):
        return values.astype(np.float32)
