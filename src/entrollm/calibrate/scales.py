"""The scales of a compressed model, while they move."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from entrollm.format import layout
from entrollm.format.grid import GridKind
from entrollm.format.log_scales import LogScales
from entrollm.format.reader import CompressedModel
from entrollm.matrix import matrix_of, open_matrix
from entrollm.threads import start_pool

Floats = NDArray[np.float32]


class MovingScales:
    """The scales of a compressed model, which may be changed at any time.

    Args:
        model: an open folder.
        threads: to decode on; None for one per core.
    Attributes:
        values: float32, the stored scales of rows and columns, by their entry in the file.
    """

    def __init__(self, model: CompressedModel, threads: int | None = None) -> None:
        self._model = model
        self._pool = start_pool(threads)
        self._stored: dict[str, _Stored] = {}
        self.values: dict[str, Floats] = {}
        for name, spec in model.specs.items():
            arrays, matrix = model.matrix_arrays(name), matrix_of(model, name)
            for suffix, values in ((layout.SCALE, matrix.scale), (layout.COLUMN_SCALE, matrix.column_scale)):
                # A stored offset would have to follow its scale.
                if values is not None and suffix in arrays and layout.OFFSET not in arrays:
                    kind = spec.kind
                    assert isinstance(kind, GridKind)
                    base = kind.scale if suffix == layout.SCALE else 1.0
                    self._stored[name + suffix] = _Stored(arrays[suffix].dtype, kind.stored.get(suffix[1:]), base)
                    self.values[name + suffix] = values

    @property
    def names(self) -> Collection[str]:
        """The coded matrices."""
        return self._model.specs

    def rounded(self) -> dict[str, NDArray[Any]]:
        """The scales as they are stored, numbers or codes, by entry; `values` become the same."""
        rounded: dict[str, NDArray[Any]] = {}
        for entry, stored in self._stored.items():
            rounded[entry], self.values[entry] = stored.round(self.values[entry])
        return rounded

    def weight(self, name: str) -> Floats:
        """A coded matrix with its present scales: float32, shape (rows, columns)."""
        arrays, spec = self._model.matrix_arrays(name), self._model.specs[name]
        present = {s: self.values[name + s] for s in (layout.SCALE, layout.COLUMN_SCALE) if name + s in self.values}
        kind = spec.kind
        if isinstance(kind, GridKind):
            kind = replace(kind, stored={}, scale=None if layout.SCALE in present else kind.scale)
        matrix = open_matrix(name, replace(spec, kind=kind, parts=None), arrays | present)
        return matrix.dequantize(np.arange(spec.rows), self._pool)


@dataclass(frozen=True)
class _Stored:
    """The form of stored scales: a type of numbers, or codes of which so many are an octave, that multiply a base."""

    dtype: np.dtype[Any]
    per_octave: str | int | None
    base: float | None

    def round(self, scales: Floats) -> tuple[NDArray[Any], Floats]:
        """Scales as they are stored, and what these stand for."""
        if not isinstance(self.per_octave, int) or self.base is None:
            numbers = scales.astype(self.dtype)
            return numbers, numbers.astype(np.float32)
        rounded = LogScales(np.zeros(0, np.uint8), self.per_octave, self.base).nearest(scales)
        return rounded.codes, rounded.values()
