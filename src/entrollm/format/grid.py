"""Matrices whose scales belong to rows and columns."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from entrollm.format.json_fields import JsonFields, is_int, whole_or_float

# Names of the arrays of scales, and how many codes an octave may have where they are stored as codes.
SCALE_ARRAYS = ("scale", "offset", "column_scale")
OCTAVE_CODES = (1, 2, 4, 8, 16, 32, 64)
_SCALE_TYPES = ("F32", "BF16")


@dataclass(frozen=True, slots=True)
class GridKind:
    """W[i, j] = (symbol[i, j] * scale[i] + offset[i]) * column_scale[j].

    With a trellis, 2 symbol[i, j] + m[i, j] is in the place of the symbol, and the scale is that of half a step; see
    `codec.trellis`.

    Attributes:
        scale: the scale of all rows, or the base of their codes; None if the rows store numbers of their own.
        offset: the offset of all rows; None if the rows store their own, or absent.
        zero: the symbol that stands for weight 0, possibly between two symbols; then offset[i] = -zero * scale[i] and
            no offset is stored. None if absent.
        stored: the form of each stored array, by a name of SCALE_ARRAYS: the type of its numbers, or for codes, which
            are bytes, the number of codes in an octave; see `log_scales.decode_scales`.
        trellis: whether the symbols of a row choose between two grids; the zero is then one of half steps.
    """

    scale: float | None = None
    offset: float | None = None
    zero: float | None = None
    stored: Mapping[str, str | int] = field(default_factory=dict)
    trellis: bool = False

    @property
    def entry_names(self) -> tuple[str, ...]:
        """The arrays that have entries of their own: none, since the one entry of the matrix holds them."""
        return ()

    def to_json(self) -> dict[str, Any]:
        """The keys of the spec that describe this kind."""
        fields: dict[str, Any] = {}
        if self.scale is not None:
            fields["scale"] = self.scale
        if self.offset is not None:
            fields["offset"] = self.offset
        if self.zero is not None:
            fields["zero"] = whole_or_float(self.zero)
        if self.stored:
            fields["scales"] = dict(self.stored)
        if self.trellis:
            fields["trellis"] = True
        return fields

    @classmethod
    def from_json(cls, spec: JsonFields) -> GridKind:
        """Parse and check the keys of a spec that is of no other kind.

        Raises:
            FormatError: the keys do not describe scales of rows and columns.
        """
        scale, offset, zero = spec.number("scale"), spec.number("offset"), spec.zero()
        if zero is not None and offset is not None:
            raise spec.error("the stored spec has both an offset and a zero")
        stored = spec.get("scales", {})
        if not isinstance(stored, dict) or not stored.keys() <= set(SCALE_ARRAYS):
            raise spec.error(f"scales must be of {', '.join(SCALE_ARRAYS)}, found {stored!r:.80}")
        for name, form in stored.items():
            is_type = isinstance(form, str) and form in (_SCALE_TYPES if name != "offset" else ("F32",))
            is_octave = is_int(form, 1, 64) and form in OCTAVE_CODES and name != "offset"
            if not (is_type or is_octave):
                raise spec.error(f"{name} is stored in an unknown form {form!r:.80}")
        if "trellis" in spec and spec.get("trellis") is not True:
            raise spec.error(f"trellis must be true or absent, found {spec.get('trellis')!r:.80}")
        return cls(scale, offset, zero, stored, "trellis" in spec)
