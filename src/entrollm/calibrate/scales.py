"""A compressed model whose scales move, and the gradients of its scales."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from entrollm.engine.linear import CodedWeights
from entrollm.engine.memory import MatrixSlot
from entrollm.engine.weights import Floats, Ids, load_tensor
from entrollm.format import layout
from entrollm.format.grid import GridKind
from entrollm.format.log_scales import LogScales
from entrollm.format.reader import CompressedModel
from entrollm.matrix import CodedMatrix, matrix_of, open_matrix


class ScaledWeights(CodedWeights):
    """The tensors of a compressed model, with scales in float32 that may be changed at any time.

    Attributes:
        scales: float32, the stored scales of rows and columns, by their entry in the file.
    """

    def __init__(self, model: CompressedModel, threads: int | None = None) -> None:
        super().__init__(model, threads)
        self._stored: dict[str, _Stored] = {}
        self.scales: dict[str, Floats] = {}
        for name, spec in model.specs.items():
            arrays, matrix = model.matrix_arrays(name), matrix_of(model, name)
            for suffix, values in ((layout.SCALE, matrix.scale), (layout.COLUMN_SCALE, matrix.column_scale)):
                # A stored offset would have to follow its scale.
                if values is not None and suffix in arrays and layout.OFFSET not in arrays:
                    kind = spec.kind
                    assert isinstance(kind, GridKind)
                    base = kind.scale if suffix == layout.SCALE else 1.0
                    self._stored[name + suffix] = _Stored(arrays[suffix].dtype, kind.stored.get(suffix[1:]), base)
                    self.scales[name + suffix] = values

    def rounded(self) -> dict[str, NDArray[Any]]:
        """The scales as they are stored, numbers or codes, by entry; those of this model become the same."""
        rounded: dict[str, NDArray[Any]] = {}
        for entry, stored in self._stored.items():
            rounded[entry], self.scales[entry] = stored.round(self.scales[entry])
        return rounded

    def tensor(self, name: str, /) -> Floats:
        """The tensor `name` in float32, coded or not."""
        if name not in self._model.specs:
            return super().tensor(name)
        matrix = self._matrix(name)
        return matrix.dequantize(np.arange(matrix.spec.rows), self.pool)

    def read(self, name: str, shape: tuple[int, ...]) -> Floats:
        """A tensor in float32.

        Raises:
            FormatError: it is missing or has another shape.
        """
        return load_tensor(self, name, shape)

    def _slot(self, name: str) -> MatrixSlot:
        # The scales may have changed since the last call.
        return MatrixSlot(self._matrix(name), False, lambda: None)

    def _matrix(self, name: str) -> CodedMatrix:
        arrays, spec = self._model.matrix_arrays(name), self._model.specs[name]
        present = {s: self.scales[name + s] for s in (layout.SCALE, layout.COLUMN_SCALE) if name + s in self.scales}
        kind = spec.kind
        if isinstance(kind, GridKind):
            kind = replace(kind, stored={}, scale=None if layout.SCALE in present else kind.scale)
        plain = replace(spec, kind=kind, parts=None)
        return open_matrix(name, plain, arrays | present)


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


class ScaleGradients:
    """Gradients of the logarithms of all scales, added up.

    Attributes:
        sums: float32, the shape of the scales, by entry.
    """

    def __init__(self, weights: ScaledWeights) -> None:
        self.sums = {entry: np.zeros_like(scale) for entry, scale in weights.scales.items()}

    def add_matrix(self, name: str, weight: Floats, gradient: Floats) -> None:
        """Add what the gradient of a matrix says of its scales; weight and gradient: float32 (rows, columns)."""
        products = weight * gradient
        self.add(name, products.sum(axis=1), products.sum(axis=0))

    def add_rows(self, name: str, ids: Ids, weight: Floats, gradient: Floats) -> None:
        """The same of rows `ids` alone, int64 (n,), each as often as it was looked up."""
        products = weight * gradient
        rows = self.sums.get(name + layout.SCALE)
        if rows is not None:
            np.add.at(rows, ids, products.sum(axis=1))
        self.add(name, np.float32(0), products.sum(axis=0))

    def add(self, name: str, rows: Floats | np.float32, columns: Floats) -> None:
        """Add the gradients of the logarithms of a matrix's scales, where it has them."""
        for suffix, gradient in ((layout.SCALE, rows), (layout.COLUMN_SCALE, columns)):
            if name + suffix in self.sums:
                self.sums[name + suffix] += gradient
