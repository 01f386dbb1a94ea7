"""Matrices whose scales belong to scale groups, as imported checkpoints have them.

A scale group is a run of columns that share a scale. The arithmetic is exactly that of the checkpoint's own runtime.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from entrollm.format.json_fields import JsonFields, is_int

Float32 = NDArray[np.float32]

_MAX_AXIS = 2**31
# The arrays of group scales, and the types that each may have.
_FLOAT_TYPES = ("F16", "BF16", "F32")
GROUP_ARRAY_TYPES: Mapping[str, tuple[str, ...]] = {
    "group_scale": (*_FLOAT_TYPES, "U8", "I8"),
    "group_zero": ("U8", *_FLOAT_TYPES),
    "group_minimum": (*_FLOAT_TYPES, "U8", "I8"),
    "super_scale": _FLOAT_TYPES,
    "super_minimum": _FLOAT_TYPES,
    "column_order": ("U32",),
}
_KEYS = frozenset({"size", "super_size", "types", "arithmetic", "values", "factor"})
_ROUNDED: Mapping[str, np.dtype[Any]] = {"F16": np.dtype(np.float16), "BF16": np.dtype(ml_dtypes.bfloat16)}
# The number that each of the 256 bytes stands for.
BYTE_VALUES = {
    "F8_E4M3": np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32),
    "F8_E5M2": np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e5m2).astype(np.float32),
}


@dataclass(frozen=True, slots=True)
class GroupedKind:
    """The form of a matrix with group scales; see docs/reference/format.md.

    Attributes:
        size: columns of a scale group; the last one of a row may be cut short.
        types: the safetensors type of each stored array, by a name of GROUP_ARRAY_TYPES; there is a group_scale.
        super_size: columns that share a super_scale and a super_minimum; None if there are none.
        arithmetic: the type that every operation on weights rounds to.
        values: F8_E4M3 or F8_E5M2 if the symbols are bytes of that type; None if they are integers.
        factor: a float32 that multiplies all weights, last; None if absent.
        zero: the symbol that stands for weight 0 in every group; None if absent or stored per group.
    """

    size: int
    types: Mapping[str, str]
    super_size: int | None = None
    arithmetic: str = "F32"
    values: str | None = None
    factor: float | None = None
    zero: int | None = None

    @property
    def entry_names(self) -> tuple[str, ...]:
        """The arrays that have entries of their own."""
        return tuple(self.types)

    def lengths(self, rows: int, columns: int) -> dict[str, int]:
        """The number of elements of each stored array, for a matrix of this shape."""
        per_row = {"group": -(-columns // self.size), "super": -(-columns // (self.super_size or columns))}
        return {
            name: columns if name == "column_order" else rows * per_row[name.partition("_")[0]] for name in self.types
        }

    def to_json(self) -> dict[str, Any]:
        """The keys of the spec that describe this kind."""
        groups: dict[str, Any] = {"size": self.size, "types": dict(self.types)}
        if self.arithmetic != "F32":
            groups["arithmetic"] = self.arithmetic
        optional = {"super_size": self.super_size, "values": self.values, "factor": self.factor}
        groups |= {key: value for key, value in optional.items() if value is not None}
        return ({} if self.zero is None else {"zero": self.zero}) | {"groups": groups}

    @classmethod
    def from_json(cls, spec: JsonFields) -> GroupedKind:
        """Parse and check the keys of a spec that has `groups`.

        Raises:
            FormatError: the keys do not describe group scales.
        """
        value = spec.require("groups")
        if not isinstance(value, dict) or value.keys() - _KEYS or not value.keys() >= {"size", "types"}:
            raise spec.error(f"groups must have size, types and no unknown keys, found {value!r:.80}")
        size, super_size, types = value["size"], value.get("super_size"), value["types"]
        if not is_int(size, 1, _MAX_AXIS) or not (super_size is None or is_int(super_size, 1, _MAX_AXIS)):
            raise spec.error(f"the size of a group must be 1 to {_MAX_AXIS}, found {value!r:.80}")
        if not isinstance(types, dict) or not all(types[k] in GROUP_ARRAY_TYPES.get(k, ()) for k in types):
            raise spec.error(f"unknown arrays or types of group scales: {types!r:.80}")
        arithmetic, values = value.get("arithmetic", "F32"), value.get("values")
        if arithmetic not in _FLOAT_TYPES or values not in (None, "F8_E4M3", "F8_E5M2"):
            raise spec.error(f"unknown arithmetic {arithmetic!r:.20} or values {values!r:.20} of groups")
        for part in ("scale", "minimum"):
            # Integer scales are multiples of a super scale; neither has a meaning without the other.
            nested = f"super_{part}" in types
            if nested != (types.get(f"group_{part}") in ("U8", "I8")) or (nested and super_size is None):
                raise spec.error(f"group_{part} and super_{part} do not go together: {value!r:.80}")
        if "group_scale" not in types:
            raise spec.error("groups have no group_scale")
        factor = JsonFields(spec.name, value).number("factor")
        if spec.number("scale") is not None or spec.number("offset") is not None:
            raise spec.error("the stored spec has groups and also a scale or an offset")
        if spec.get("scales", {}):
            raise spec.error("the stored spec has both groups and scales")
        if "trellis" in spec:
            raise spec.error("the stored spec has both groups and a trellis")
        zero = spec.zero()
        if zero is not None and ("group_zero" in types or zero != int(zero)):
            raise spec.error(f"the stored spec has groups and a zero that does not go with them: {zero!r}")
        return cls(size, dict(types), super_size, arithmetic, values, factor, None if zero is None else int(zero))


@dataclass(frozen=True)
class GroupScales:
    """The scales of one matrix: W[i, j] = ((value[i, j] - zero[i, g]) * scale[i, g] - minimum[i, g]) * factor.

    g is the group of column j in stored order; value is the symbol, or the number that it stands for as an fp8 byte.
    An operation whose operand is absent is left out. With super scales, scale[i, g] = super_scale[i, s] *
    group_scale[i, g], and likewise for the minimum. Every operation rounds to float32; operations on weights then
    round to `form.arithmetic`.

    Attributes:
        form: sizes of groups, types and arithmetic.
        arrays: by a name of `form.types`, shape (rows, groups) or (rows, super groups); column_order has (columns,).
    """

    form: GroupedKind
    arrays: Mapping[str, NDArray[Any]]

    def apply(self, symbols: Float32, rows: slice | NDArray[np.int64]) -> Float32:
        """Dequantize.

        Args:
            symbols: float32, shape (n, columns), in stored order; may be overwritten.
            rows: which rows of the matrix these are.
        Returns:
            float32, shape (n, columns), in the original order of columns.
        """
        form, values = self.form, symbols
        if form.values is not None:
            values = BYTE_VALUES[form.values][symbols.astype(np.uint8)]
        if self.form.zero is not None:
            values = self._rounded(np.subtract(values, np.float32(self.form.zero), out=values))
        elif "group_zero" in self.arrays:
            values = self._each(np.subtract, values, self.arrays["group_zero"][rows].astype(np.float32))
        values = self._each(np.multiply, values, self._nested("scale", rows))
        if "group_minimum" in self.arrays:
            values = self._each(np.subtract, values, self._nested("minimum", rows))
        if form.factor is not None:
            values = self._rounded(np.multiply(values, np.float32(form.factor), out=values))
        order = self.arrays.get("column_order")
        if order is None:
            return values
        original = np.empty_like(values)
        original[:, order] = values
        return original

    @property
    def values(self) -> Float32 | None:
        """What the 256 symbols stand for: float32 (256,); None if they stand for themselves."""
        return None if self.form.values is None else BYTE_VALUES[self.form.values]

    def nested(self, part: str) -> Float32:
        """The scales or minimums of all groups, times their super scales: float32 (rows, groups)."""
        return self._nested(part, slice(None))

    def _nested(self, part: str, rows: slice | NDArray[np.int64]) -> Float32:
        """The scales or the minimums of some rows, float32 (n, groups)."""
        own: Float32 = self.arrays["group_" + part][rows].astype(np.float32)
        if "super_" + part not in self.arrays or self.form.super_size is None:
            return own
        of_group = np.arange(own.shape[1], dtype=np.int64) * self.form.size // self.form.super_size
        outer: Float32 = self.arrays["super_" + part][rows].astype(np.float32)[:, of_group]
        return outer * own

    def _each(self, operation: np.ufunc, values: Float32, scales: Float32) -> Float32:
        """Apply an operation to each weight and the number of its group, in place."""
        rows, columns = values.shape
        size = self.form.size
        if columns % size == 0:
            grouped = values.reshape(rows, columns // size, size)
            operation(grouped, scales[:, :, None], out=grouped)
        else:
            operation(values, np.repeat(scales, min(size, columns), axis=1)[:, :columns], out=values)
        return self._rounded(values)

    def _rounded(self, values: Float32) -> Float32:
        """Round to the type of the arithmetic. Rounding to float32 first does no harm after one operation."""
        dtype = _ROUNDED.get(self.form.arithmetic)
        if dtype is not None:
            values[...] = values.astype(dtype)
        return values
