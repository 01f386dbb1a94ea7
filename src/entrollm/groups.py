"""Scales of groups of columns, as imported checkpoints have them, and the exact arithmetic that applies them."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from entrollm.specs import Groups

Float32 = NDArray[np.float32]

_ROUNDED: Mapping[str, np.dtype[Any]] = {"F16": np.dtype(np.float16), "BF16": np.dtype(ml_dtypes.bfloat16)}
# The number that each byte stands for.
BYTE_VALUES = {
    "F8_E4M3": np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32),
    "F8_E5M2": np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e5m2).astype(np.float32),
}


@dataclass(frozen=True)
class GroupScales:
    """The scales of one matrix: W[i, j] = ((value[i, j] - zero[i, g]) * scale[i, g] - minimum[i, g]) * factor.

    g is the group of column j in stored order; value is the symbol, or what it means as an fp8 byte. What is absent is
    left out. Where there are super scales, scale[i, g] = super_scale[i, s] * group_scale[i, g], and likewise for the
    minimum. Every operation is rounded to float32, those on weights also to the type `form.arithmetic`.

    Attributes:
        form: sizes of groups, arithmetic.
        arrays: by a name of `form.types`, shape (rows, groups) or (rows, supers); column_order: (columns,).
        zero: the zero of all groups, where the arrays hold none; None for none.
    """

    form: Groups
    arrays: Mapping[str, NDArray[Any]]
    zero: int | None = None

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
        if self.zero is not None:
            values = self._rounded(np.subtract(values, np.float32(self.zero), out=values))
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

    @functools.cached_property
    def terms(self) -> tuple[Float32, Float32 | None, Float32 | None]:
        """W = value * scale + shift without rounding to half precision.

        Returns:
            scale and shift, float32 (rows * groups,), the shift None where it is 0; and the values of the 256 symbols,
            None where they are the symbols.
        """
        values = None if self.form.values is None else BYTE_VALUES[self.form.values]
        factor = np.float32(1 if self.form.factor is None else self.form.factor)
        scale = self._nested("scale", slice(None))
        shift = None
        if "group_zero" in self.arrays:
            shift = scale * -self.arrays["group_zero"].astype(np.float32)
        elif self.zero is not None:
            shift = scale * np.float32(-self.zero)
        if "group_minimum" in self.arrays:
            minimum = self._nested("minimum", slice(None))
            shift = -minimum if shift is None else shift - minimum
        return (scale * factor).reshape(-1), None if shift is None else (shift * factor).reshape(-1), values

    def _nested(self, part: str, rows: slice | NDArray[np.int64]) -> Float32:
        """The scales or minimums of some rows, float32 (n, groups)."""
        own: Float32 = self.arrays["group_" + part][rows].astype(np.float32)
        if "super_" + part not in self.arrays or self.form.super_size is None:
            return own
        of_group = np.arange(own.shape[1], dtype=np.int64) * self.form.size // self.form.super_size
        outer: Float32 = self.arrays["super_" + part][rows].astype(np.float32)[:, of_group]
        return outer * own

    def _each(self, operation: np.ufunc, values: Float32, scales: Float32) -> Float32:
        """Apply an operation to each weight and its group's number, in place."""
        rows, columns = values.shape
        size = self.form.size
        if columns % size == 0:
            grouped = values.reshape(rows, columns // size, size)
            operation(grouped, scales[:, :, None], out=grouped)
        else:
            operation(values, np.repeat(scales, min(size, columns), axis=1)[:, :columns], out=values)
        return self._rounded(values)

    def _rounded(self, values: Float32) -> Float32:
        """Round to the arithmetic's type; an operation on two 16-bit floats in float32 loses nothing that matters."""
        dtype = _ROUNDED.get(self.form.arithmetic)
        if dtype is not None:
            values[...] = values.astype(dtype)
        return values
