"""The kind of matrix whose scales belong to rows and columns."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from entrollm.format.json_fields import JsonFields, is_int, whole_or_float

# Arrays of scales that are stored with a matrix, the types of their elements, and how many codes an octave may have.
SCALE_ARRAYS = ("scale", "offset", "column_scale")
OCTAVE_CODES = (1, 2, 4, 8, 16, 32, 64)
_SCALE_TYPES = ("F32", "BF16")


@dataclass(frozen=True, slots=True)
class GridKind:
    """W[i, j] = (symbol[i, j] * scale[i] + offset[i]) * column_scale[j].

    Attributes:
        scale, offset: those of the whole matrix; None if they are stored per row (the offset may also be absent).
        zero: the symbol that stands for 0, perhaps between two symbols, where offset[i] = -zero * scale[i] and no
            offset is stored; None if absent.
        stored: by a name of SCALE_ARRAYS, the type of a stored array, or if it is stored as bytes, how many of their
            codes make an octave; see `log_scales.decode_scales`.
    """

    scale: float | None = None
    offset: float | None = None
    zero: float | None = None
    stored: Mapping[str, str | int] = field(default_factory=dict)

    @property
    def entry_names(self) -> tuple[str, ...]:
        """The arrays that are stored in entries of their own: none, they are in the matrix's one entry."""
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
        return fields

    @classmethod
    def from_json(cls, spec: JsonFields) -> GridKind:
        """Parse and check the keys of a spec that has no other kind.

        Raises:
            FormatError: they do not describe scales of rows and columns.
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
        return cls(scale, offset, zero, stored)
