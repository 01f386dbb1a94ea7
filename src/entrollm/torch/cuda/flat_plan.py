"""How the product of flat matrices is divided among blocks and warps."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

from entrollm.torch.cuda.compile import Macros
from entrollm.torch.cuda.flat import HEAD_WORDS, STRIPE_STEPS
from entrollm.torch.cuda.gpu import Gpu
from entrollm.torch.cuda.layout import LANES, STEP_BYTES, TILE_ROWS

LAUNCH_VECTORS = 32
"""Vectors of one launch at most."""
_MOST_SPLITS = 32
# Lanes read digits of up to three vectors more than there are, behind the last step.
_SPARE_BYTES = 3 * STEP_BYTES
# Beyond these, sums and fields take so many registers that a block has fewer threads.
_FEW_VECTORS = 4
_FEW_BITS = 4
_MANY_THREADS, _MOST_THREADS = 512, 256  # with up to 16 vectors, and with more
# Times for `_cost`, in cycles of a multiprocessor.
_SHARE_STRIPES = 0.5  # what a share costs at its beginning and end, in stripes
_STRIPE_CYCLES = 110.0  # of fields of 4 bits from memory, 2 KB
_VECTOR_CYCLES = 4.0  # a stripe's products and digits for one vector
_COPY_CYCLES = 8.0  # to copy a stripe's digits of one vector to shared memory
_PARTIAL_CYCLES = 2.0  # to add the sums of a tile and one vector to those of other blocks


@dataclass(frozen=True)
class FlatPlan:
    """How the product with a number of vectors is divided.

    Attributes:
        vectors: that there is room for.
        prepared: whether a kernel of its own rounds them.
        threads: of a block.
        open_tiles: tiles of a block that can be in progress at once.
        splits: parts that the columns of every tile are split into, each for another block.
        shares: warps among which such a part is divided.
        state_bytes, digits_bytes: shared memory for variables, and for the digits of x.
    """

    vectors: int
    prepared: bool
    threads: int
    open_tiles: int
    splits: int
    shares: int
    state_bytes: int
    digits_bytes: int

    @property
    def end_bytes(self) -> int:
        """Where the shared memory in use ends."""
        return self.state_bytes + self.digits_bytes

    def macros(self, widths: tuple[int, int], ahead_pieces: int, dtype: int) -> Macros:
        """What the compiler must know for fields of these widths and a type, by its number in TYPES."""
        return (
            ("BATCH", self.vectors),
            ("TYPE", dtype),
            ("THREADS", self.threads),
            ("AHEAD", max(1, ahead_pieces // widths[1])),
            ("OPEN_TILES", self.open_tiles),
            ("PREPARED", int(self.prepared)),
            ("STATE_BYTES", self.state_bytes),
            ("MIN_BITS", widths[0]),
            ("MAX_BITS", widths[1]),
        )


@functools.lru_cache(maxsize=1024)
def flat_plan(gpu: Gpu, tiles: tuple[int, ...], stripes: int, most_bits: int, batch: int) -> FlatPlan:
    """Divide the product of some matrices.

    Args:
        gpu: the GPU.
        tiles: of each matrix.
        stripes: of a tile.
        most_bits: of a field.
        batch: vectors, at most LAUNCH_VECTORS.
    """
    if batch <= gpu.tuning.flat_rounded:
        plan = _plan(gpu, batch, most_bits, prepared=False)
        if plan.state_bytes + _digits_bytes(stripes, batch) <= gpu.block_bytes:
            return _divided(gpu, plan, tiles, stripes, 1)
    plan = _plan(gpu, -(-batch // 4) * 4, most_bits, prepared=True)
    stripe_bytes = _digits_bytes(1, plan.vectors) - _SPARE_BYTES
    room = max(1, (gpu.block_bytes - plan.state_bytes - _SPARE_BYTES) // stripe_bytes)
    fewest = -(-stripes // room)
    choices = range(fewest, max(fewest, min(stripes, _MOST_SPLITS)) + 1)
    plans = [_divided(gpu, plan, tiles, stripes, splits) for splits in choices]
    return min(plans, key=lambda plan: _cost(gpu, plan, tiles, stripes))


def _plan(gpu: Gpu, vectors: int, most_bits: int, prepared: bool) -> FlatPlan:
    open_tiles = 16 if vectors <= 8 else 8
    row_vectors = vectors + 4 if vectors >= 4 and vectors % 8 != 4 else vectors
    is_small = vectors <= _FEW_VECTORS and most_bits <= _FEW_BITS
    many = _MANY_THREADS if vectors <= 16 else _MOST_THREADS
    threads = gpu.tuning.flat_threads if is_small else many
    # `State` of flat_product.cu.
    state = open_tiles * (HEAD_WORDS * 4 + TILE_ROWS * row_vectors * 8 + 8) + vectors * 8 + threads // LANES * 8
    return FlatPlan(vectors, prepared, threads, open_tiles, 1, 1, -(-state // 128) * 128, 0)


def _divided(gpu: Gpu, plan: FlatPlan, tiles: Sequence[int], stripes: int, splits: int) -> FlatPlan:
    """The cheapest division of a tile's part among warps, for a number of parts."""
    digits = _digits_bytes(-(-stripes // splits), plan.vectors)
    shares = range(1, max(1, stripes // splits) + 1)
    plans = [
        FlatPlan(plan.vectors, plan.prepared, plan.threads, plan.open_tiles, splits, count, plan.state_bytes, digits)
        for count in shares
    ]
    return min(plans, key=lambda plan: _cost(gpu, plan, tiles, stripes))


def _digits_bytes(stripes: int, vectors: int) -> int:
    return stripes * STRIPE_STEPS * STEP_BYTES * vectors + _SPARE_BYTES


def launch_vectors(gpu: Gpu, stripes: int, most_bits: int, batch: int) -> int:
    """Vectors that one launch of a product with `batch` vectors should take.

    A few that every block can round itself are better in two launches than prepared by a kernel of their own.
    """
    if batch > gpu.tuning.flat_rounded:
        return LAUNCH_VECTORS
    for launches in range(1, batch + 1):
        vectors = -(-batch // launches)
        state_bytes = _plan(gpu, vectors, most_bits, prepared=False).state_bytes
        if state_bytes + _digits_bytes(stripes, vectors) <= gpu.block_bytes:
            return vectors
    return LAUNCH_VECTORS


def _cost(gpu: Gpu, plan: FlatPlan, tiles: Sequence[int], stripes: int) -> float:
    """About how many cycles a multiprocessor takes."""
    blocks = max(len(tiles), gpu.multiprocessors // plan.splits)
    block_tiles = math.ceil(sum(tiles) / blocks)
    waves = math.ceil(blocks * plan.splits / gpu.multiprocessors)
    warps = plan.threads // LANES
    part = math.ceil(stripes / plan.splits)
    turns = math.ceil(block_tiles * plan.shares / warps)
    stripe = max(_STRIPE_CYCLES, _VECTOR_CYCLES * plan.vectors)
    cycles = turns * warps * stripe * (math.ceil(part / plan.shares) + _SHARE_STRIPES)
    if plan.prepared:
        cycles += part * plan.vectors * _COPY_CYCLES
    if plan.splits > 1:
        cycles += block_tiles * plan.vectors * _PARTIAL_CYCLES * TILE_ROWS / 4
    return waves * cycles


def block_groups(sizes: Sequence[int], blocks: int) -> list[int]:
    """Share out groups of blocks among matrices by their size in bytes; each gets at least one."""
    total = sum(sizes)
    free = max(0, blocks - len(sizes))
    edges = [round(sum(sizes[: i + 1]) / total * free) for i in range(len(sizes))]
    return [1 + end - begin for begin, end in zip([0, *edges], edges, strict=False)]
