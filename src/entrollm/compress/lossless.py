"""Matrices that keep their bits: which tensors can, and what takes the place of their quantizer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase

import numpy as np
from numpy.typing import NDArray

from entrollm import _core
from entrollm.checkpoint.model_folder import Checkpoint
from entrollm.codec.huffman import huffman_bits
from entrollm.codec.words import divide, divide_into, word_type
from entrollm.compress.options import ALL_MATRICES, CodingOptions
from entrollm.errors import Message, Option, UnsupportedError
from entrollm.format.lossless import GRID_NAME, LOSSLESS_TYPES, LosslessKind
from entrollm.quantize.method import CodeChooser, Quantized, RowSource, sum_counts
from entrollm.quantize.select import TensorPlan, is_quantizable

# Weights that are looked at together, and those that a size is predicted from.
_CHUNK_WEIGHTS = 1 << 20
_SAMPLE_WEIGHTS = 1 << 20
# What a matrix takes above the Huffman optimum of a sample, at most.
_LARGEST_EXCESS = 1.01
# What its spec and the padding of its entries take, at most.
_OVERHEAD_BYTES = 1000


def make_lossless(
    checkpoint: Checkpoint, plans: Mapping[str, TensorPlan], options: CodingOptions
) -> dict[str, TensorPlan]:
    """Plan the matrices that match a glob of `options.lossless` as lossless, where words of 8 or 16 bits hold them.

    Others of them keep their type, which loses nothing either. Globs of tensors that keep their type win, and imported
    matrices keep their integers.

    Args:
        checkpoint: the model.
        plans: what would become of its tensors otherwise.
        options: of compression.
    Raises:
        UnsupportedError: a matrix is fp8 with scales and would be quantized.
        ValueError: a glob matches no matrix.
    """
    kept = [override.pattern for override in options.overrides if override.bits is None]
    matrices = [name for name in plans if is_quantizable(name, checkpoint.tensors[name].shape)]
    for pattern in options.lossless:
        if pattern != ALL_MATRICES and not any(fnmatchcase(name, pattern) for name in matrices):
            raise ValueError(f"the pattern {pattern!r} matches no matrix, and only matrices are coded without loss")
    found = dict(plans)
    for name in matrices:
        if plans[name].is_imported or not _matches(name, options.lossless) or _matches(name, kept):
            continue
        if checkpoint.has_scales(name):
            raise UnsupportedError(
                f"{name} is fp8 with scales, which stays exact only where all matrices keep their integers",
                hint=Message("leave out {} and {}", Option("bpw"), Option("bits")),
            )
        found[name] = TensorPlan(None, is_lossless=_type_of(checkpoint, name) is not None)
    return found


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _type_of(checkpoint: Checkpoint, name: str) -> str | None:
    """The type of words that hold a tensor; None if its own type is the only one."""
    info = checkpoint.tensors[name]
    if info.dtype in LOSSLESS_TYPES:
        return info.dtype
    if info.dtype != "F32" or not info.weights:
        return None
    step = max(1, _CHUNK_WEIGHTS * info.shape[0] // info.weights)
    chunks = (checkpoint.read(name, i, min(info.shape[0], i + step)) for i in range(0, info.shape[0], step))
    holds = all(word_type(chunk) for chunk in chunks)
    checkpoint.release(name)
    return "BF16" if holds else None


class LosslessQuantizer:
    """Takes over the bits of matrices that words of 8 or 16 bits hold."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint

    def quantize(self, source: RowSource, choose: CodeChooser) -> Quantized:
        """The symbols and the low bytes of a matrix, which have no error; no value is refused."""
        name, shape = source.name, source.shape
        dtype = self._checkpoint.tensors[name].dtype
        kind = LosslessKind("BF16" if dtype == "F32" else dtype)
        symbols = np.empty(shape, np.uint8)
        low = np.empty(shape, np.uint8) if kind.has_low else None

        def read(rows: tuple[int, int]) -> NDArray[np.int64]:
            own = slice(*rows)
            divide_into(kind, self._checkpoint.read(name, *rows), symbols[own], None if low is None else low[own])
            return _core.histogram(symbols[own])

        counts = sum_counts(source.map(read))
        scale = np.ones(1, np.float32)
        return Quantized(symbols, counts, GRID_NAME, scale, error=0.0, energy=0.0, lossless=kind, low=low)


def expected_bytes(checkpoint: Checkpoint, name: str) -> int:
    """A bound on what a lossless matrix takes in its file, from the histogram of a sample of its rows."""
    info = checkpoint.tensors[name]
    rows, columns = info.shape
    kind = LosslessKind("BF16" if info.dtype == "F32" else info.dtype)
    picked = np.unique(np.linspace(0, rows - 1, min(rows, max(1, _SAMPLE_WEIGHTS // columns))).astype(int))
    histograms = (_core.histogram(divide(kind, checkpoint.read(name, int(i), int(i) + 1))[0]) for i in picked)
    bits = huffman_bits([int(count) for count in sum_counts(histograms)]) + kind.low_bits
    checkpoint.release(name)
    return round(bits * _LARGEST_EXCESS * info.weights / 8) + _OVERHEAD_BYTES
