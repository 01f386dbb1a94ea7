"""Check a compressed folder: checksums, structure, bit-exact coding, and agreement with its original."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from entrollm import _core
from entrollm.checkpoint.model_folder import Checkpoint
from entrollm.checkpoint.names import natural_key
from entrollm.checkpoint.quantization import is_buffer
from entrollm.compress.describe import symbol_chunks
from entrollm.compress.stacks import find_stacks
from entrollm.errors import CorruptStreamError, FormatError
from entrollm.files.dtypes import DTYPES, check_finite
from entrollm.format import layout
from entrollm.format.flat import FlatCode
from entrollm.format.grid import GridKind
from entrollm.format.group_scales import GroupedKind
from entrollm.format.lossless import LosslessKind
from entrollm.format.reader import CompressedModel
from entrollm.format.spec import TensorSpec
from entrollm.matrix import CodedMatrix, code_of, matrix_of
from entrollm.quantize.paper import Grid, quantize_rows

# The stored error was added up in another order.
_ERROR_TOLERANCE = 1e-3
_PAPER_PREFIX = "paper-"
_COMPARED_WEIGHTS = 1 << 22


@dataclass(frozen=True, slots=True)
class VerifyResult:
    """What was checked; a failed check raises instead.

    Attributes:
        matrices, kept: the numbers of coded matrices and of plain tensors.
        weights: coded weights that were decoded, encoded again and found equal.
        compared: whether the folder was compared with its original.
        left_out: buffers that only the original has; models make them themselves.
    """

    matrices: int
    kept: int
    weights: int
    compared: bool
    left_out: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """All fields."""
        return asdict(self)


def verify(
    model: CompressedModel,
    pool: _core.ThreadPool,
    original: Checkpoint | None = None,
    on_progress: Callable[[float, float], None] | None = None,
) -> VerifyResult:
    """Check every tensor.

    A plain tensor passes if its bytes have their checksum and its values are finite. A coded matrix passes if, in
    addition, every block decodes to its stated length and encoding the symbols again gives the stored bytes. If there
    is an original, quantizing it again must give the symbols of every paper grid, imported and lossless weights must
    equal the original's bit for bit, the error of every matrix must be the stored one, and plain tensors must be equal.

    Args:
        model: the folder.
        pool: threads to decode on.
        original: the checkpoint that the folder was made from; None if absent.
        on_progress: called with the weights that are done and all weights.
    Raises:
        CorruptStreamError: bytes differ from their checksum or do not decode exactly.
        FormatError: a structure is malformed, or the original differs.
    """
    total = sum(spec.rows * spec.columns for spec in model.specs.values())
    done = 0
    left_out: tuple[str, ...] = ()
    if original is not None:
        stacks = {name: members for name, members in find_stacks(model.specs).items() if name in original.tensors}
        original.split(stacks)
        left_out = _compare_names(model, original)
    for name, spec in model.specs.items():
        model.check_checksum(name)
        matrix = matrix_of(model, name)
        stored = model.matrix_arrays(name)
        _check_coding(code_of(model, name), stored, pool)
        _check_end(matrix, model.entries(name))
        if original is not None:
            _compare_matrix(matrix, stored, original, pool)
            original.release(name)
        model.release(name)
        done += spec.rows * spec.columns
        if on_progress is not None:
            on_progress(done, total)
    for name in model.plain:
        model.check_checksum(name)
        check_finite(name, model.array(name))
        if original is not None:
            _compare_kept(model, name, original)
    return VerifyResult(len(model.specs), len(model.plain), total, original is not None, left_out)


def _check_coding(matrix: CodedMatrix, stored: dict[str, NDArray[Any]], pool: _core.ThreadPool) -> None:
    """Decode a matrix, encode it again, and compare the result with the stored streams."""
    spec = matrix.spec
    ends = dict.fromkeys((layout.DENSE, layout.SPARSE, layout.SPARSE_SIZES), 0)
    empty = np.zeros(0, np.uint8)
    for begin, symbols in symbol_chunks(matrix, pool):
        try:
            encoded = _encode(spec, stored, begin, symbols)
        except ValueError as error:
            raise CorruptStreamError(f"{matrix.name}: rows from {begin} on: {error}") from None
        for suffix, array in zip(ends, encoded, strict=True):
            if suffix == layout.SPARSE_SIZES and not ends[layout.SPARSE]:
                continue  # a code without lists, or a flat one without patches so far, has no sizes
            found = stored.get(suffix, empty)[ends[suffix] : ends[suffix] + array.size]
            if not np.array_equal(found, array):
                raise CorruptStreamError(
                    f"{matrix.name}: encoding its integers again gives other bytes in {suffix[1:]}, near row {begin}"
                )
            ends[suffix] += array.size
    _check_padding(matrix, stored, ends)


def _encode(
    spec: TensorSpec, stored: dict[str, NDArray[Any]], begin: int, symbols: NDArray[np.uint8]
) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
    """The dense and the sparse stream of some rows, and the sizes of the latter."""
    code = spec.code
    if isinstance(code, FlatCode):
        first = begin // code.segment_rows
        windows = np.array(stored[layout.SEGMENTS][first : first + code.segments(len(symbols))])
        fields, patches, sizes, _ = _core.encode_flat(symbols, code.segment_rows, windows)
        return fields, patches.view(np.uint8), sizes
    return _core.encode(code.program(), code.low_bits, symbols, spec.blocks.rows, spec.blocks.columns)


def _check_padding(matrix: CodedMatrix, stored: Mapping[str, NDArray[Any]], ends: Mapping[str, int]) -> None:
    # In an entry with parts, the next part follows a stream in place of padding.
    sizes = dict(zip(layout.STREAMS, matrix.spec.parts or (), strict=False))
    for suffix in layout.STREAMS:
        stream = stored.get(suffix, np.zeros(0, np.uint8))
        if stream[ends[suffix] : sizes.get(suffix)].any():
            raise CorruptStreamError(f"{matrix.name}: the padding after its {suffix[1:]} stream is not zero")


def _check_end(matrix: CodedMatrix, entries: Mapping[str, NDArray[Any]]) -> None:
    low = entries.get(layout.LOW)
    if low is not None and low[matrix.spec.rows * matrix.spec.columns :].any():
        raise CorruptStreamError(f"{matrix.name}: the padding after its low bytes is not zero")
    parts = matrix.spec.parts
    if parts is not None and entries[layout.CODED][sum(parts) :].any():
        raise CorruptStreamError(f"{matrix.name}: the padding at the end of its entry is not zero")


def _compare_names(model: CompressedModel, original: Checkpoint) -> tuple[str, ...]:
    """The buffers of the original that the folder lacks; a folder that transformers has saved does not have them."""
    ours, theirs = {*model.specs, *model.plain}, set(original.tensors)
    left_out = {name for name in theirs - ours if is_buffer(name, original.tensors[name].dtype)}
    for name in sorted((ours ^ theirs) - left_out):
        where = model.path if name in ours else original.path
        raise FormatError(f"tensor {name!r} is only in {where}; {model.path} was made from another checkpoint")
    return tuple(sorted(left_out, key=natural_key))


def _compare_matrix(
    matrix: CodedMatrix, stored: dict[str, NDArray[Any]], original: Checkpoint, pool: _core.ThreadPool
) -> None:
    spec, name = matrix.spec, matrix.name
    if original.tensors[name].shape != (spec.rows, spec.columns):
        shape = (spec.rows, spec.columns)
        raise FormatError(f"{name}: the original has shape {original.tensors[name].shape}, not {shape}")
    if isinstance(spec.kind, LosslessKind):
        _compare_bits(matrix, original, pool)
        return
    is_exact = isinstance(spec.kind, GroupedKind)
    grid = _stored_grid(spec, stored)
    error = energy = 0.0
    for begin, symbols in symbol_chunks(matrix, pool):
        weights = original.read_float32(name, begin, begin + len(symbols))
        if grid is not None and not np.array_equal(quantize_rows(weights, grid, begin), symbols):
            raise FormatError(f"{name}: quantizing the original again gives other integers, from row {begin} on")
        rows = np.arange(begin, begin + len(symbols), dtype=np.int64)
        found = matrix.dequantize(rows, pool)
        if is_exact and found.tobytes() != weights.tobytes():
            raise FormatError(f"{name}: its weights are not exactly those of the original, from row {begin} on")
        difference = found - weights
        error += float(np.sum(np.square(difference, dtype=np.float64)))
        energy += float(np.sum(np.square(weights, dtype=np.float64)))
    relative = math.sqrt(error / energy) if energy else 0.0
    if not math.isclose(relative, spec.relative_error, rel_tol=_ERROR_TOLERANCE, abs_tol=1e-6):
        raise FormatError(f"{name}: its error against the original is {relative:.6f}, stored {spec.relative_error:.6f}")


def _compare_bits(matrix: CodedMatrix, original: Checkpoint, pool: _core.ThreadPool) -> None:
    spec, name = matrix.spec, matrix.name
    if original.plain_dtype(name) != spec.dtype or name in original.imported:
        raise FormatError(f"{name}: the original has type {original.plain_dtype(name)}, not {spec.dtype}")
    step = max(1, _COMPARED_WEIGHTS // (spec.columns * spec.blocks.rows)) * spec.blocks.rows
    for begin in range(0, spec.rows, step):
        end = min(spec.rows, begin + step)
        if matrix.original(begin, end, pool).tobytes() != original.read(name, begin, end).tobytes():
            raise FormatError(f"{name}: its weights are not bit for bit those of the original, from row {begin} on")


def _stored_grid(spec: TensorSpec, stored: dict[str, NDArray[Any]]) -> Grid | None:
    """The paper grid of a matrix, with 8 bits, since its symbols need no clipping; None if it has another grid."""
    kind = spec.kind
    if not isinstance(kind, GridKind) or kind.trellis or not spec.grid_name.startswith(_PAPER_PREFIX):
        return None
    scale = np.array([kind.scale], np.float32) if kind.scale is not None else stored[layout.SCALE]
    offset = np.array([kind.offset], np.float32) if kind.offset is not None else stored.get(layout.OFFSET)
    return Grid("symmetric" if offset is None else "asymmetric", 8, scale, offset)


def _compare_kept(model: CompressedModel, name: str, original: Checkpoint) -> None:
    dtype = original.plain_dtype(name)
    theirs = original.read(name) if dtype == original.tensors[name].dtype else original.read_float32(name)
    ours = model.array(name)
    same = ours.shape == theirs.shape and ours.tobytes() == theirs.astype(DTYPES[dtype]).tobytes()
    if model.dtype(name) != dtype or not same:
        raise FormatError(f"{name}: the kept tensor differs from the original")
