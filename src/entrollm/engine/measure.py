"""How fast this machine decodes and multiplies, for people who choose an instruction set or a code."""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np

from entrollm import _core
from entrollm.codec.blocks import choose_blocks
from entrollm.codec.choose import choose_code
from entrollm.format.blocks import block_count
from entrollm.format.code import Code
from entrollm.format.layout import padded_stream
from entrollm.threads import start_pool

# Columns of a common width; the coded rows stay in cache, so that decoding is measured and not memory.
_ROWS, _COLUMNS = 512, 4096
_MEASURE_S = 0.1


@dataclass(frozen=True, slots=True)
class ProductSpeed:
    """Fused decode and product of one vector with Gaussian weights on a 4-bit grid.

    Attributes:
        coded_bits: stored bits per weight.
        weights_per_s: weights decoded and multiplied in a second, at best.
    """

    coded_bits: float
    weights_per_s: float


def product_speed(threads: int) -> ProductSpeed:
    """Measure for about a tenth of a second with `threads` threads."""
    generator = np.random.default_rng(0)
    symbols = np.clip(np.rint(generator.standard_normal((_ROWS, _COLUMNS)) * 2 + 8), 0, 15).astype(np.uint8)
    blocks = choose_blocks(_ROWS, _COLUMNS)
    counts = [int(count) for count in _core.histogram(symbols)]
    code = choose_code(counts, block_count(_ROWS, _COLUMNS, blocks), "speed", "avx512")
    assert isinstance(code, Code)  # flat codes are for other processors
    dense, sparse, sizes = _core.encode(code.program(), code.low_bits, symbols, blocks.rows, blocks.columns)
    matrix = _core.CodedMatrix(
        code.program(),
        code.low_bits,
        _core.Geometry(_ROWS, _COLUMNS, blocks.rows, blocks.columns),
        padded_stream([dense]),
        padded_stream([sparse]),
        sizes,
        np.ones(1, np.float32),
        None,
        None,
    )
    x = generator.standard_normal((1, _COLUMNS)).astype(np.float32)
    pool = start_pool(threads)
    best = float("inf")
    end = time.perf_counter() + _MEASURE_S
    while (begin := time.perf_counter()) < end:
        matrix.multiply(x, pool)
        best = min(best, time.perf_counter() - begin)
    stored_bytes = dense.nbytes + sparse.nbytes + sizes.nbytes
    return ProductSpeed(stored_bytes * 8 / symbols.size, symbols.size / best)
