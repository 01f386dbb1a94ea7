"""The requested size of a model, in bits per weight or in bytes."""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction

# Below a limit, this share is left free, so that the rounding of the last tensor does not exceed the limit.
_FIT_MARGIN = 0.001
_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_UNITS |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}
_MAX_BYTES = 2**63 - 1
_MOST_DIGITS = 1000  # Python refuses to read thousands
_SIZE = re.compile(r"\s*([0-9]*\.?[0-9]+)\s*([A-Za-z]*)\s*")


@dataclass(frozen=True, slots=True)
class Target:
    """A size of the weight files, everything included. One of the three attributes states it, the others are None.

    Attributes:
        bits_per_weight: over all weights of the model.
        file_bytes: the limit of the size. One above what the model can take gives the finest steps.
        coded_bits: per weight of the coded matrices, so that large kept tensors do not make these coarser. A model that
            cannot meet it, such as one of tiny matrices, comes as near as it can at a fine step.
    """

    bits_per_weight: float | None = None
    file_bytes: int | None = None
    coded_bits: float | None = None

    def __post_init__(self) -> None:
        if sum(size is not None for size in (self.bits_per_weight, self.file_bytes, self.coded_bits)) != 1:
            raise ValueError("a target is either bits per weight or a file size")
        if self.bits_per_weight is not None and not 0 < self.bits_per_weight < 64:
            raise ValueError(f"bits per weight must be above 0 and below 64, found {self.bits_per_weight}")
        if self.file_bytes is not None and not 1 <= self.file_bytes <= _MAX_BYTES:
            raise ValueError(f"a file size must be at least 1 byte and below 2^63, found {self.file_bytes}")

    def aim_bytes(self, weights: int) -> float:
        """The size to aim at for a model of `weights` weights."""
        if self.file_bytes is not None:
            return self.file_bytes * (1 - _FIT_MARGIN)
        assert self.bits_per_weight is not None
        return self.bits_per_weight * weights / 8

    def limit_bytes(self, weights: int) -> float:
        """The largest size that meets the target for a model of `weights` weights."""
        if self.file_bytes is not None:
            return self.file_bytes
        return self.aim_bytes(weights) * 1.004


DEFAULT_BPW = 4.5
"""Bits per weight where nothing else is asked for."""
DEFAULT_TARGET = Target(coded_bits=DEFAULT_BPW)
"""The size where nothing else is asked for."""


def parse_size(text: str) -> int:
    """Parse a file size in decimal or binary units, such as 1.9GB, 900MB or 1.5GiB, into bytes.

    Raises:
        ValueError: `text` is not a valid file size.
    """
    match = _SIZE.fullmatch(text) if len(text) <= _MOST_DIGITS else None
    if match is None or match[2].upper() not in _UNITS:
        raise ValueError(f"{text!r:.80} is not a valid file size; write 1.9GB, 900MB or 1.5GiB")
    size_bytes = int(Fraction(match[1]) * _UNITS[match[2].upper()])
    if size_bytes > _MAX_BYTES:
        raise ValueError(f"{text!r:.40} is more than a file can hold; write 1.9GB, 900MB or 1.5GiB")
    return size_bytes
