"""What undoes the steps by which llama.cpp's converter makes a tensor of a file from one of a model."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from entrollm.checkpoint.imported.gguf import dequantize
from entrollm.errors import FormatError
from entrollm.files.gguf import FLOAT_TYPES

Float32 = NDArray[np.float32]
Order = NDArray[np.int64]
Shape = tuple[int, ...]


class Change(Protocol):
    """A step that is undone.

    Attributes:
        others: the ends of the names of further tensors of the layer that are needed.
        columns: where each column of a file's matrix belongs; None if all are in order.
    """

    @property
    def others(self) -> tuple[str, ...]:
        """See the class."""

    @property
    def columns(self) -> Order | None:
        """See the class."""

    def form(self, kinds: tuple[str, ...], shapes: tuple[Shape, ...]) -> tuple[str, Shape]:
        """The type and shape of the tensor, of those of the file's.

        Raises:
            FormatError: they do not go together; the message lacks the name of the file and the tensor.
        """

    def apply(self, kinds: tuple[str, ...], arrays: list[NDArray[Any]]) -> NDArray[Any]:
        """The tensor, of the file's: floats, or the bytes of quantized rows.

        Raises:
            FormatError: they hold what no model has; the message lacks the name of the file and the tensor.
        """


# By the end of a tensor's name in the file, the tensors that are made of it by the ends of their names.
Changes = Mapping[str, Mapping[str, Change]]


@dataclass(frozen=True, kw_only=True, eq=False)
class Rows:
    """Rows, columns and numbers of one tensor.

    Attributes:
        rows: which rows of the file's tensor the model's has, in its order; None for all.
        total: rows of the file's tensor; None if they are as many as the model's.
        half: 0 or 1 if the model has only the first or second half of the rows; None if it has both.
        columns: as in Change; blocks keep their order of columns, and their reader sorts them.
        is_flat: the rows are one vector.
        values: makes the numbers of those in the file; None if they are the same.
    """

    rows: Order | None = None
    total: int | None = None
    half: int | None = None
    columns: Order | None = None
    is_flat: bool = False
    values: Callable[[Float32], Float32] | None = None
    others: tuple[str, ...] = ()

    def form(self, kinds: tuple[str, ...], shapes: tuple[Shape, ...]) -> tuple[str, Shape]:
        """See Change."""
        (shape,) = shapes
        if self.rows is not None:
            total = self.total or len(self.rows)
            if not shape or shape[0] != total:
                raise FormatError(f"has shape {list(shape)}, expected {total} rows")
            shape = (len(self.rows), *shape[1:])
        if self.half is not None:
            if shape[0] % 2:
                raise FormatError(f"has shape {list(shape)}, expected an even number of rows")
            shape = (shape[0] // 2, *shape[1:])
        if self.columns is not None and (len(shape) != 2 or shape[1] != len(self.columns)):
            raise FormatError(f"has shape {list(shape)}, expected {len(self.columns)} columns")
        if self.values is not None and kinds[0] not in FLOAT_TYPES:
            raise FormatError(f"is {kinds[0]}, expected one of {', '.join(FLOAT_TYPES)}")
        kind = kinds[0] if self.values is None else "F32"
        return kind, (math.prod(shape),) if self.is_flat else shape

    def apply(self, kinds: tuple[str, ...], arrays: list[NDArray[Any]]) -> NDArray[Any]:
        """See Change."""
        (array,) = arrays
        if self.rows is not None:
            array = array[self.rows]
        if self.half is not None:
            array = np.split(array, 2)[self.half]
        if self.columns is not None and kinds[0] in FLOAT_TYPES:
            array = array[:, np.argsort(self.columns)]
        if self.is_flat:
            array = array.reshape(-1)
        return array if self.values is None else self.values(array.astype(np.float32))


@dataclass(frozen=True, kw_only=True, eq=False)
class KeysAndValues:
    """The projection of latent vectors to keys and values, which the file has apart, with the keys' part transposed.

    A transposed matrix cannot stay in its blocks, so that quantized ones become floats.

    Attributes:
        heads: of attention.
    """

    heads: int
    others: tuple[str, ...] = ("attn_v_b.weight",)
    columns: Order | None = None

    def form(self, kinds: tuple[str, ...], shapes: tuple[Shape, ...]) -> tuple[str, Shape]:
        """See Change."""
        keys, values = shapes
        if not (len(keys) == len(values) == 3 and keys[0] == values[0] == self.heads and keys[1] == values[2]):
            raise FormatError(
                f"has shape {list(keys)} beside attn_v_b of shape {list(values)}, expected those of {self.heads} heads"
            )
        return self._kind(kinds), (self.heads * (keys[2] + values[1]), keys[1])

    def apply(self, kinds: tuple[str, ...], arrays: list[NDArray[Any]]) -> NDArray[Any]:
        """See Change."""
        parts = [self._floats(kind, array) for kind, array in zip(kinds, arrays, strict=True)]
        joined = np.concatenate([parts[0].swapaxes(1, 2), parts[1]], axis=1)
        return joined.reshape(-1, joined.shape[2]).astype(FLOAT_TYPES[self._kind(kinds)], copy=False)

    def _kind(self, kinds: tuple[str, ...]) -> str:
        return kinds[0] if kinds[0] == kinds[1] and kinds[0] in FLOAT_TYPES else "F32"

    def _floats(self, kind: str, array: NDArray[Any]) -> Float32:
        floats: Float32 = array.astype(np.float32) if kind in FLOAT_TYPES else dequantize(kind, array)
        if not np.isfinite(floats).all():
            raise FormatError("or attn_v_b holds a number that is not finite; fetch the file again")
        return floats.reshape(self.heads, -1, floats.shape[-1])


@dataclass(frozen=True, kw_only=True, eq=False)
class Joined:
    """Rows of one tensor, and then those of another."""

    others: tuple[str, ...]
    columns: Order | None = None

    def form(self, kinds: tuple[str, ...], shapes: tuple[Shape, ...]) -> tuple[str, Shape]:
        """See Change."""
        if kinds[0] != kinds[1] or not shapes[0] or not shapes[1] or shapes[0][1:] != shapes[1][1:]:
            raise FormatError(
                f"is {kinds[0]} of shape {list(shapes[0])}, and {self.others[0]} of its layer {kinds[1]} of shape "
                f"{list(shapes[1])}; expected one type and length of rows"
            )
        return kinds[0], (shapes[0][0] + shapes[1][0], *shapes[0][1:])

    def apply(self, kinds: tuple[str, ...], arrays: list[NDArray[Any]]) -> NDArray[Any]:
        """See Change."""
        return np.concatenate(arrays)


def flat() -> Rows:
    """A vector that the file has as a matrix."""
    return Rows(is_flat=True)


def logarithms(rows: Order | None = None) -> Rows:
    """The A_log of linear layers, of which the file has -exp; `rows` as in Rows."""
    return Rows(rows=rows, is_flat=True, values=_logarithms)


def _logarithms(numbers: Float32) -> Float32:
    if not (numbers < 0).all():
        raise FormatError("holds a number that is not below 0; fetch the file again")
    found: Float32 = np.log(-numbers)
    return found


# The gate and up projections of experts, which a file may have in one stack.
SPLIT_EXPERTS: Changes = MappingProxyType(
    {
        "ffn_gate_up_exps.weight": {
            "mlp.experts.{}.gate_proj.weight": Rows(half=0),
            "mlp.experts.{}.up_proj.weight": Rows(half=1),
        }
    }
)
