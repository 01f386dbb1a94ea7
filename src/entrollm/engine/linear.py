"""The weights that the engine multiplies with: coded matrices of a compressed folder, or dense float32 ones."""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from entrollm import _core
from entrollm.checkpoint.names import text_names
from entrollm.codec.words import encode_words, word_type
from entrollm.engine.memory import MatrixSlot, Memory, MemoryPlan, prepare_ahead
from entrollm.engine.residency import Residency
from entrollm.engine.weights import DenseMatrix, Embedding, Fetch, Floats, Ids, Linear, stacked_matrix
from entrollm.errors import FormatError
from entrollm.files.dtypes import to_float32
from entrollm.format.code import RAW_BITS, Code, Field
from entrollm.format.reader import CompressedModel
from entrollm.matrix import CodedMatrix, Product, matrix_of, open_matrix
from entrollm.threads import spin_us, start_pool

if TYPE_CHECKING:
    from entrollm.checkpoint.model_folder import Checkpoint


class CodedLinear:
    """Coded or flat matrices side by side. A product decodes a coded one block by block and never holds it decoded."""

    def __init__(self, slots: Sequence[MatrixSlot], pool: _core.ThreadPool) -> None:
        self._slots = slots
        self._pool = pool
        specs = [slot.matrix.spec for slot in slots]
        self.shape = (sum(spec.rows for spec in specs), specs[0].columns)
        self._product: Product | None = None

    def __call__(self, x: Floats, /) -> Floats:
        """Multiply: float32 (n, in_features) -> float32 (n, out_features)."""
        return self._prepared()(x, self._pool)

    def native(self, bias: Floats | None) -> _core.JoinedProduct | None:
        """The product for native layers, which add `bias` to it; None if they do not take it.

        Raises:
            CorruptStreamError: the bytes of a matrix are damaged.
        """
        return self._prepared().native(bias)

    def _prepared(self) -> Product:
        if self._product is None:
            self._product = Product([slot.ready(self._pool) for slot in self._slots])  # in their final form
        return self._product


class CodedEmbedding:
    """A coded or flat matrix that is read by row, in the form that it has."""

    def __init__(self, slot: MatrixSlot, pool: _core.ThreadPool) -> None:
        self._slot = slot
        self._pool = pool
        self.shape = (slot.matrix.spec.rows, slot.matrix.spec.columns)

    def rows(self, ids: Ids, /) -> Floats:
        """Look up: int64 (n,) -> float32 (n, in_features)."""
        return self._slot.checked().dequantize(ids, self._pool)


class DenseLinear:
    """A matrix in float32."""

    def __init__(self, weight: Floats) -> None:
        self._weight = weight
        self.shape = (weight.shape[0], weight.shape[1])

    def __call__(self, x: Floats, /) -> Floats:
        """Multiply: float32 (n, in_features) -> float32 (n, out_features)."""
        return x @ self._weight.T

    def rows(self, ids: Ids, /) -> Floats:
        """Look up: int64 (n,) -> float32 (n, in_features)."""
        return self._weight[ids]


class WordLinear:
    """A matrix in the words of its own type, in memory."""

    def __init__(self, matrix: CodedMatrix, pool: _core.ThreadPool) -> None:
        self._matrix = matrix
        self._pool = pool
        self._product = Product([matrix])
        self.shape = (matrix.spec.rows, matrix.spec.columns)

    def __call__(self, x: Floats, /) -> Floats:
        """Multiply: float32 (n, in_features) -> float32 (n, out_features)."""
        return self._product(x, self._pool)

    def rows(self, ids: Ids, /) -> Floats:
        """Look up: int64 (n,) -> float32 (n, in_features)."""
        return self._matrix.dequantize(ids, self._pool)


class SideBySide:
    """Linear layers of different kinds on the same input."""

    def __init__(self, linears: Sequence[Linear]) -> None:
        self._linears = linears
        self.shape = (sum(linear.shape[0] for linear in linears), linears[0].shape[1])

    def __call__(self, x: Floats, /) -> Floats:
        """Multiply: float32 (n, in_features) -> float32 (n, out_features)."""
        return np.concatenate([linear(x) for linear in self._linears], axis=1)


def _dense(name: str, weight: Floats) -> DenseLinear:
    if weight.ndim != 2:
        raise FormatError(f"{name}: config.json asks for a matrix, found shape {weight.shape}")
    return DenseLinear(weight)


class CodedWeights:
    """The tensors of a compressed folder. Matrices that were kept in their type are dense.

    Args:
        model: the folder.
        threads: of products; `None` for one per performance core.
        memory: which matrices are transcoded to the flat form when they are first multiplied with; see `MemoryPlan`.
        check: compare the bytes of each tensor with their checksum before they are first used.
    Raises:
        FormatError: two tensors have the same name in a causal model.
    """

    def __init__(
        self, model: CompressedModel, threads: int | None, memory: Memory = "file", *, check: bool = False
    ) -> None:
        self._model = model
        self._checks = check
        is_tied = model.config.get("tie_word_embeddings") is True
        self._names = text_names([*model.specs, *model.plain], is_tied=is_tied)
        self.pool = start_pool(threads, spin_us())
        self._flat = MemoryPlan(model, memory, self.pool.size).flat
        self._residency = Residency(model, memory) if isinstance(memory, int) else None
        self._slots: dict[str, MatrixSlot] = {}
        self._multiplied: dict[str, MatrixSlot] = {}
        self._looked_up: dict[str, MatrixSlot] = {}
        self._dense: dict[str, DenseMatrix] = {}

    def __contains__(self, name: str, /) -> bool:
        return name in self._names or self._stacked(name) is not None

    def linear(self, *names: str) -> Linear:
        """The matrices `names`, their outputs side by side, to multiply with."""
        if all(self._names.get(name) in self._model.specs for name in names):
            slots = [self._slot(name) for name in names]
            self._multiplied.update(zip(names, slots, strict=True))
            return CodedLinear(slots, self.pool)
        if len(names) > 1:
            return SideBySide([self.linear(name) for name in names])
        return self._kept(names[0])

    def embedding(self, name: str, /) -> Embedding:
        """The matrix `name`, to look rows up in."""
        if self._names.get(name) in self._model.specs:
            self._looked_up[name] = self._slot(name)
            return CodedEmbedding(self._looked_up[name], self.pool)
        return self._kept(name)

    def fetcher(self, experts: Sequence[Sequence[str]], /) -> Fetch | None:
        """What reads experts ahead; None without a limit of memory, or if they are parts of one tensor."""
        names = [tuple(self._names[name] for name in each if name in self._names) for each in experts]
        if self._residency is None or not all(names):
            return None
        return self._residency.fetcher(names)

    def tensor(self, name: str, /) -> Floats:
        """The tensor `name` in float32.

        Raises:
            CorruptStreamError: its bytes differ from their checksum.
            FormatError: it is a coded matrix, or is not of a floating type.
        """
        return _as_float32(name, self._array(name))

    def _array(self, name: str) -> NDArray[Any]:
        """The tensor `name`, which may be one of a stack, as it is stored; see tensor."""
        stacked = self._stacked(name)
        stored = self._names[name] if stacked is None else stacked[0]
        if stored in self._model.specs:
            raise FormatError(f"{name}: it is a coded matrix, config.json asks for a vector")
        if self._checks:
            self._model.check_checksum(stored)
        array = self._model.array(stored)
        return array if stacked is None else array[stacked[1]]

    def prepare(self) -> None:
        """Start to check matrices and to transcode those that are to be flat, in the order of their first use.

        With a limit of memory, each matrix is checked when it is first used.

        Raises:
            ValueError: the limit is too low.
        """
        if self._residency is not None:
            self._residency.check()
            return
        slots = [slot for name, slot in self._multiplied.items() if self._checks or self._names[name] in self._flat]
        looked_up = list(self._looked_up.values()) if self._checks else []
        if slots or looked_up:
            prepare_ahead(slots, looked_up, self.pool)

    def _stacked(self, name: str) -> tuple[str, int] | None:
        """The kept tensor of three axes that holds the matrix `name`, and its number in it; None if none does."""
        if name in self._names:
            return None
        found = stacked_matrix(name, self._kept_shape)
        return None if found is None else (self._names[found[0]], found[1])

    def _kept_shape(self, name: str) -> tuple[int, ...] | None:
        stored = self._names.get(name)
        return self._model.array(stored).shape if stored in self._model.plain else None

    def _slot(self, name: str) -> MatrixSlot:
        if name not in self._slots:
            stored = self._names[name]
            matrix = matrix_of(self._model, stored)
            check = partial(self._model.check_checksum, stored) if self._checks else None
            release = partial(self._model.release, stored)
            self._slots[name] = MatrixSlot(matrix, stored in self._flat, release, check)
        return self._slots[name]

    def _kept(self, name: str) -> DenseMatrix:
        if name not in self._dense:
            self._dense[name] = self._open_kept(name)
        return self._dense[name]

    def _open_kept(self, name: str) -> DenseMatrix:
        """A matrix that was kept in its type: in words of two bytes or one where these hold it, else in float32."""
        stored = self._array(name)
        words = word_type(stored) if stored.ndim == 2 and stored.size else None
        if words is None:
            return _dense(name, _as_float32(name, stored))
        weights = _as_float32(name, stored) if words == "BF16" else stored
        spec, arrays = encode_words(weights, _as_they_are)
        return WordLinear(open_matrix(name, spec, arrays), self.pool)


def _as_float32(name: str, stored: NDArray[Any]) -> Floats:
    try:
        return to_float32(stored)
    except TypeError as error:
        raise FormatError(f"{name}: {error}") from None


def _as_they_are(counts: Sequence[int], blocks: int, raw_bits: int) -> Code:
    """The code that stores symbols as bytes."""
    return Code(Field(RAW_BITS, ()))


class DenseWeights:
    """The tensors of an ordinary checkpoint, in float32; the reference that compressed models are compared with."""

    def __init__(self, checkpoint: Checkpoint, threads: int | None = None) -> None:
        self.pool = start_pool(threads, spin_us())
        self._checkpoint = checkpoint
        is_tied = checkpoint.config.get("tie_word_embeddings") is True
        self._names = text_names(checkpoint.tensors, is_tied=is_tied)
        self._matrices: dict[str, DenseMatrix] = {}

    def __contains__(self, name: str, /) -> bool:
        return name in self._names or self._stacked(name) is not None

    def linear(self, *names: str) -> Linear:
        """The matrices `names`, their outputs side by side, to multiply with."""
        matrices = [self._matrix(name) for name in names]
        return matrices[0] if len(matrices) == 1 else SideBySide(matrices)

    def embedding(self, name: str, /) -> Embedding:
        """The matrix `name`, to look rows up in."""
        return self._matrix(name)

    def tensor(self, name: str, /) -> Floats:
        """The tensor `name` in float32."""
        return self._checkpoint.read_float32(self._names[name])

    def fetcher(self, experts: Sequence[Sequence[str]], /) -> Fetch | None:
        """None: nothing is read ahead."""
        return None

    def fingerprint(self) -> str:
        """What differs between models: a hash of the configuration and of all tensors, which are read for it."""
        sums = {
            name: zlib.crc32(self._checkpoint.read_float32(name).reshape(-1).view(np.uint8).data)
            for name in sorted(self._names.values())
        }
        text = json.dumps([self._checkpoint.config, sorted(sums.items())], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    def _matrix(self, name: str) -> DenseMatrix:
        if name not in self._matrices:
            stacked = self._stacked(name)
            if stacked is not None:
                stack, index = stacked
                self._matrices[name] = _dense(name, self._checkpoint.read_float32(stack, index, index + 1)[0])
            else:
                self._matrices[name] = self._open(self._names[name])
        return self._matrices[name]

    def _stacked(self, name: str) -> tuple[str, int] | None:
        """The tensor of three axes that holds the matrix `name`, and its number in it; None if none does."""
        if name in self._names:
            return None
        found = stacked_matrix(name, self._shape)
        return None if found is None else (self._names[found[0]], found[1])

    def _shape(self, name: str) -> tuple[int, ...] | None:
        stored = self._names.get(name)
        return None if stored is None else self._checkpoint.tensors[stored].shape

    def _open(self, stored: str) -> DenseMatrix:
        """The matrix of a stored name."""
        return _dense(stored, self._checkpoint.read_float32(stored))
