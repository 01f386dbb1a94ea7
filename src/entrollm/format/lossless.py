"""Matrices whose weights keep the bits that they had; see docs/reference/format.md."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from entrollm.format.json_fields import JsonFields

LOSSLESS_TYPES = ("BF16", "F16", "F8_E4M3", "F8_E5M2")
"""The types of words that are coded without loss."""
GRID_NAME = "lossless"
"""What specs of these matrices state in the place of a grid."""
_NO_SCALES = ("scale", "offset", "zero", "scales", "groups", "trellis")


@dataclass(frozen=True, slots=True)
class LosslessKind:
    """The bits of W[i, j], rotated left by one, are symbol[i, j], and then low[i, j] if they are 16.

    Attributes:
        type: the type of the words, one of LOSSLESS_TYPES; BF16 also for F32 weights whose lower halves are zero.
    """

    type: str

    @property
    def entry_names(self) -> tuple[str, ...]:
        """The arrays that have entries of their own."""
        return ("low",) if self.has_low else ()

    @property
    def has_low(self) -> bool:
        """Whether a word has a byte that is not coded."""
        return self.type in ("BF16", "F16")

    @property
    def low_bits(self) -> int:
        """Bits of a word that are stored as they are, besides those of the code."""
        return 8 if self.has_low else 0

    def to_json(self) -> dict[str, Any]:
        """The keys of the spec that describe this kind."""
        return {"lossless": self.type}

    @classmethod
    def from_json(cls, spec: JsonFields) -> LosslessKind:
        """Parse and check the keys of a spec that has `lossless`.

        Raises:
            FormatError: the keys do not describe lossless words of the spec's dtype.
        """
        words, dtype = spec.text("lossless"), spec.text("dtype")
        if words not in LOSSLESS_TYPES:
            raise spec.error(f"lossless must be one of {', '.join(LOSSLESS_TYPES)}, found {words!r}")
        if words != dtype and (words, dtype) != ("BF16", "F32"):
            raise spec.error(f"{dtype} weights cannot be stored as {words} words without loss")
        if stray := [key for key in _NO_SCALES if key in spec]:
            raise spec.error(f"the stored spec has both lossless and {stray[0]}")
        if spec.number("error") != 0:
            raise spec.error("the stored spec has both lossless and an error")
        return cls(words)
