"""Predict the result of compressing to a size, without writing anything."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from entrollm.checkpoint.model_folder import Checkpoint
from entrollm.checkpoint.names import natural_key
from entrollm.checkpoint.resolve import resolve
from entrollm.codec.blocks import blocks_for, choose_blocks
from entrollm.codec.choose import choose_code, choose_lossless_code
from entrollm.codec.encode import encode_symbols, row_chunks
from entrollm.codec.words import encode_words
from entrollm.compress.lossless import expected_bytes
from entrollm.compress.options import ALL_MATRICES, CodingOptions
from entrollm.compress.planning import make_plan, with_size
from entrollm.compress.result import MatrixError
from entrollm.compress.sized import SizedMethods
from entrollm.compress.statistics import Statistics
from entrollm.compress.target import Target
from entrollm.format import layout
from entrollm.format.blocks import block_count
from entrollm.format.entry import join_arrays
from entrollm.format.grid import GridKind
from entrollm.format.log_scales import float_scales
from entrollm.format.spec import TensorSpec
from entrollm.matrix import multiply, open_matrix
from entrollm.quantize.ecsq import PRICE, EcsqQuantizer
from entrollm.quantize.method import ArraySource
from entrollm.threads import default_threads, start_pool

_TIMED_WEIGHTS = 1 << 23
_TIMED_COLUMNS = 4096
_TIMED_RUNS = 5
# Every model whose weights are mostly quantized can take this size.
_PROBE_BITS = 4.0
# The share by which an actual size may differ from the predicted one.
_UNCERTAINTY = 0.005


@dataclass(frozen=True, slots=True)
class TensorEstimate:
    """A prediction for one matrix.

    Attributes:
        name, shape: the matrix.
        step: over the RMS of the matrix.
        file_bits: per weight, its share of the header included.
        relative_error: RMS error over the RMS of the weights.
    """

    name: str
    shape: tuple[int, int]
    step: float
    file_bits: float
    relative_error: float

    @property
    def weights(self) -> int:
        """Number of weights."""
        return self.shape[0] * self.shape[1]


@dataclass(frozen=True, slots=True)
class SizePlan:
    """A prediction for a whole model.

    Attributes:
        tensors: the matrices; a lossless one has a step and an error of 0.
        weights: weights of the whole model.
        file_bytes: of all weight files, everything included; file_bits, the same per weight.
        load_bytes: memory of the loaded model; its code bytes are file cache, which the system may drop.
        compress_bytes: a bound on the memory that compressing takes.
        relative_error: of the matrices, the root of the mean of its squares over all their weights.
        worst: the matrix with the largest relative error.
        tokens_per_s: for one sequence, from the measured speed of a product on this machine.
    """

    tensors: tuple[TensorEstimate, ...]
    weights: int
    file_bytes: int
    file_bits: float
    load_bytes: int
    compress_bytes: int
    relative_error: float
    worst: MatrixError
    tokens_per_s: float

    def to_json(self) -> dict[str, Any]:
        """All fields."""
        return asdict(self)


def plan(model: str | Path, options: CodingOptions) -> SizePlan:
    """Predict size, error and speed of a model compressed to a target.

    Args:
        model: a checkpoint folder or a Hub id.
        options: of compression, with a target or the default one.
    Raises:
        FormatError: the checkpoint is malformed or has a weight that is not finite.
        ValueError: the target is out of reach, or another option is wrong.
    """
    with Checkpoint.open(resolve(model)) as checkpoint:
        if checkpoint.imported:
            raise ValueError(
                f"{checkpoint.path} is quantized already ({checkpoint.quantization}), and compress keeps its integers, "
                "so no size can be chosen; plan the checkpoint that it was made from"
            )
        options = with_size(checkpoint, options)
        if options.target is None and ALL_MATRICES not in options.lossless:
            raise ValueError("a plan needs a size: bits per weight or bytes")
        planned = make_plan(checkpoint, options)
        if not planned.coded:
            raise ValueError(f"{checkpoint.path} has no matrix to quantize")
        exact = {name: _exact(checkpoint, name) for name in planned.coded if name in planned.lossless}
        rest = replace(planned, coded=tuple(name for name in planned.coded if name not in exact))
        methods = SizedMethods(checkpoint, rest, options) if rest.coded else None
        found = exact if methods is None else exact | {name: _estimate(methods, name) for name in methods.curves}
        tensors = tuple(found[name] for name in sorted(found, key=natural_key))
        weights = sum(info.weights for info in checkpoint.tensors.values())
        kept_bytes = sum(checkpoint.tensors[name].size_bytes for name in planned.kept)
    if methods is None:
        file_bytes = kept_bytes + round(sum(t.file_bits * t.weights / 8 for t in tensors))
    else:
        file_bytes = round(methods.control.predicted_bytes())
    largest = max(t.weights for t in tensors)
    return SizePlan(
        tensors=tensors,
        weights=weights,
        file_bytes=file_bytes,
        file_bits=file_bytes * 8 / max(1, weights),
        load_bytes=file_bytes,
        compress_bytes=2 * 4 * largest + 300_000_000,
        relative_error=_mean_error(tensors),
        worst=max((MatrixError(t.name, t.relative_error) for t in tensors), key=lambda found: found.relative_error),
        tokens_per_s=1 / max(_multiplying_s(tensors, exact, methods, options), 1e-9),
    )


def size_range(model: str | Path, options: CodingOptions, statistics: Statistics | None = None) -> tuple[float, float]:
    """The smallest and the largest bits per weight that `compress` can meet, everything included.

    Args:
        model: a checkpoint folder or a Hub id.
        options: of compression; the target is ignored.
        statistics: what calibration measured; None if absent.
    Raises:
        FormatError: the checkpoint is malformed or has a weight that is not finite.
        ValueError: an option is wrong.
    """
    options = replace(options, target=Target(bits_per_weight=_PROBE_BITS))
    with Checkpoint.open(resolve(model)) as checkpoint:
        methods = SizedMethods(checkpoint, make_plan(checkpoint, options), options, statistics)
        weights = sum(info.weights for info in checkpoint.tensors.values())
        smallest, largest = methods.control.size_range()
    return smallest * (1 + _UNCERTAINTY) * 8 / weights, largest * (1 - _UNCERTAINTY) * 8 / weights


def _estimate(methods: SizedMethods, name: str) -> TensorEstimate:
    step = methods.control.step(name)
    curve = methods.curves[name]
    point = curve.at(step)
    return TensorEstimate(name, curve.shape, step, point.stored_bytes * 8 / curve.weights, point.error**0.5)


def _mean_error(tensors: Sequence[TensorEstimate]) -> float:
    weights = sum(t.shape[0] * t.shape[1] for t in tensors)
    return math.sqrt(math.fsum(t.relative_error**2 * t.shape[0] * t.shape[1] for t in tensors) / weights)


def _exact(checkpoint: Checkpoint, name: str) -> TensorEstimate:
    """A lossless matrix."""
    rows, columns = checkpoint.tensors[name].shape
    return TensorEstimate(name, (rows, columns), 0.0, expected_bytes(checkpoint, name) * 8 / (rows * columns), 0.0)


def _multiplying_s(
    tensors: Sequence[TensorEstimate],
    exact: Collection[str],
    methods: SizedMethods | None,
    options: CodingOptions,
) -> float:
    """Seconds that the products of one token take."""
    threads = options.threads or default_threads()
    multiplied = [t for t in tensors if not _is_looked_up(t.name, tensors)]
    lossless = sum(t.weights for t in multiplied if t.name in exact)
    rounded = sum(t.weights for t in multiplied) - lossless
    elapsed = rounded / _product_rate(methods, threads, options) if methods is not None else 0.0
    return elapsed + (lossless / _lossless_rate(threads) if lossless else 0.0)


def _is_looked_up(name: str, tensors: Sequence[TensorEstimate]) -> bool:
    """Whether a token reads only one row of a matrix: the embedding of a model that has a separate head."""
    return "embed_tokens" in name and any("lm_head" in other.name for other in tensors)


def _product_rate(methods: SizedMethods, threads: int, options: CodingOptions) -> float:
    """Weights per second of a product with a Gaussian matrix at the model's median step; the best of a few runs."""
    steps = sorted(methods.control.step(name) for name in methods.curves)
    shape = (_TIMED_WEIGHTS // _TIMED_COLUMNS, _TIMED_COLUMNS)
    weights = np.random.default_rng(0).standard_normal(shape, np.float32)
    blocks = choose_blocks(*shape)
    count = block_count(*shape, blocks)
    choose = partial(choose_code, blocks=count, prefer=options.prefer, processor=options.processor)
    quantizer = EcsqQuantizer(steps[len(steps) // 2], price=PRICE if options.trellis else 0.0, trellis=options.trellis)
    quantized = quantizer.quantize(ArraySource("timed", weights), choose)
    code = choose([int(c) for c in quantized.counts])
    with ThreadPoolExecutor(threads) as executor:
        arrays = encode_symbols(
            quantized.symbols, code, blocks, row_chunks(*shape, blocks), executor, lambda finished: None
        )
    arrays[layout.SCALE] = float_scales(quantized.scale)
    kind = GridKind(zero=quantized.zero, trellis=quantized.trellis)
    spec = TensorSpec(*shape, "F32", quantized.grid, code, blocks_for(code, *shape), kind)
    matrix = open_matrix("timed", *join_arrays(spec, arrays))
    pool = start_pool(threads)
    return _timed_rate(lambda: multiply([matrix], weights[:1], pool))


def _lossless_rate(threads: int) -> float:
    """Weights per second of a product with a Gaussian matrix of lossless bfloat16."""
    shape = (_TIMED_WEIGHTS // _TIMED_COLUMNS, _TIMED_COLUMNS)
    weights = np.random.default_rng(0).standard_normal(shape, np.float32)
    spec, arrays = encode_words(weights.astype(ml_dtypes.bfloat16), choose_lossless_code)
    matrix = open_matrix("timed", spec, arrays)
    pool = start_pool(threads)
    return _timed_rate(lambda: multiply([matrix], weights[:1], pool))


def _timed_rate(run: Callable[[], object]) -> float:
    elapsed = []
    for _ in range(_TIMED_RUNS):
        started = time.perf_counter()
        run()
        elapsed.append(time.perf_counter() - started)
    return _TIMED_WEIGHTS / min(elapsed)
