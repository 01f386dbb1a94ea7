"""A coded matrix in the form in which a file holds it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from numpy.typing import NDArray

from entrollm.format import layout
from entrollm.format.entry import join_arrays
from entrollm.format.spec import TensorSpec


@dataclass(frozen=True, eq=False)
class StoredMatrix:
    """A coded matrix as a file holds it. It is made once; what measures or writes it leaves it as it is.

    Attributes:
        name: the tensor's name in the original checkpoint.
        spec: what the matrix is, with the checksum of its name, spec and entries.
        spec_text: the JSON form of the spec.
        entries: the stored arrays by suffix, in the order of `layout.SUFFIXES`; each has one axis and is not empty.
    """

    name: str
    spec: TensorSpec
    spec_text: str
    entries: Mapping[str, NDArray[Any]]

    @classmethod
    def seal(cls, name: str, spec: TensorSpec, entries: Mapping[str, NDArray[Any]]) -> Self:
        """Compute the checksum of entries that are in their stored form already.

        Args:
            name: the tensor's name.
            spec: its spec; the checksum in it is ignored.
            entries: its entries by suffix.
        """
        ordered = {suffix: entries[suffix] for suffix in layout.SUFFIXES if suffix in entries}
        text = spec.to_json()
        checksum = layout.checksum(name, text, ordered)
        spec = dataclasses.replace(spec, checksum=checksum)
        return cls(name, spec, layout.with_checksum(text, checksum), ordered)


def store_matrix(name: str, spec: TensorSpec, arrays: Mapping[str, NDArray[Any]]) -> StoredMatrix:
    """Put a matrix into its stored form.

    Args:
        name: the tensor's name.
        spec: its spec; the checksum in it is ignored.
        arrays: by suffix, its arrays, streams with their padding, or the entries that they were joined into; empty
            arrays are ignored.
    """
    if layout.CODED in arrays:
        return StoredMatrix.seal(name, spec, arrays)
    return StoredMatrix.seal(name, *join_arrays(spec, arrays))
