"""Where a product keeps what in a block's shared memory."""

from __future__ import annotations

import functools
from dataclasses import dataclass

from entrollm.torch.cuda.gpu import RESERVED_BYTES, Gpu
from entrollm.torch.cuda.layout import (
    ROW_BYTES,
    SPAN_COLUMNS,
    STEP_BYTES,
    STEP_COLUMNS,
    TABLE_BYTES,
    TILE_ROWS,
    UNIT_COLUMNS,
)
from entrollm.torch.cuda.tuning import Tuning

_STATE_BYTES = 2 << 10  # the kernel's variables except those of open tiles, at most
_SLOT_SLACK_BYTES = 256  # kernels read words this far behind the streams of a chunk
_LINE_BYTES = 128  # what a warp reads at once; slots begin at multiples of this
_CHUNK_STEP_BYTES = 512


@dataclass(frozen=True)
class TablePlace:
    """Where the code's table is in shared memory: at a multiple of its size, so that kernels find entries by a mask.

    Attributes:
        state_bytes: the kernel's variables in front of it, at most.
        copies: of the table, for 32 lanes.
    """

    state_bytes: int
    copies: int

    @property
    def begin(self) -> int:
        """Its address, behind what CUDA reserves and the kernel's variables."""
        size = TABLE_BYTES * self.copies
        return -(-(RESERVED_BYTES + self.state_bytes) // size) * size

    @property
    def end(self) -> int:
        """Where it ends."""
        return self.begin + TABLE_BYTES * self.copies

    @property
    def front_bytes(self) -> int:
        """Memory in front of it that kernels may use."""
        return self.begin - RESERVED_BYTES - self.state_bytes

    def macros(self) -> tuple[tuple[str, int], ...]:
        """What the compiler must know."""
        return ("COPIES", self.copies), ("TABLE_AT", self.begin), ("STATE_BYTES", self.state_bytes)


@dataclass(frozen=True)
class Plan:
    """How a product uses a multiprocessor. Sizes are in bytes of a block's shared memory.

    Attributes:
        tuning: the table of the GPU's family.
        blocks: blocks that share a multiprocessor.
        triple_bytes, raw_bytes: activations in the order of triples, and in that of raw units.
        slot_bytes: a slot for a chunk.
        in_front: whether activations are in front of the table and all slots behind it.
        front_slots: slots in front of the table.
        slots: all slots; 0 if even activations do not fit.
        table: where the code's table is.
        end_bytes: where the shared memory in use ends.
    """

    tuning: Tuning
    blocks: int
    triple_bytes: int
    raw_bytes: int
    slot_bytes: int
    in_front: bool
    front_slots: int
    slots: int
    table: TablePlace
    end_bytes: int

    @property
    def threads(self) -> int:
        """Threads of a block."""
        return self.tuning.product_threads // self.blocks

    @property
    def early(self) -> int:
        """Chunks to request before x is read."""
        return max(1, self.tuning.early_bytes // self.blocks // self.slot_bytes)

    @property
    def fits(self) -> bool:
        """Whether warps need not wait for each chunk. Two blocks share a multiprocessor only where all chunks fit."""
        return self.blocks > 1 or self.slots >= self.tuning.fewest_slots


@functools.lru_cache(maxsize=1024)
def plan_of(gpu: Gpu, batch: int, columns: int, raw: bool, chunk_bytes: int, blocks: int = 1) -> Plan:
    """Share out the shared memory of a block.

    Args:
        gpu: the GPU.
        batch: vectors.
        columns: columns of the matrices, padded.
        raw: whether symbols have raw bits.
        chunk_bytes: size of the largest chunk.
        blocks: blocks that share a multiprocessor, 1 or 2.
    """
    plans = [_plan(gpu, batch, columns, raw, chunk_bytes, blocks, copies) for copies in gpu.tuning.table_copies]
    roomy = (plan for plan in plans if plan.slots >= gpu.tuning.wanted_slots)
    return next(roomy, max(plans, key=lambda plan: plan.slots))


def _plan(gpu: Gpu, batch: int, columns: int, raw: bool, chunk_bytes: int, blocks: int, copies: int) -> Plan:
    most = gpu.tuning.slots(batch)
    triple_bytes = -(-columns // SPAN_COLUMNS) * (SPAN_COLUMNS // STEP_COLUMNS) * STEP_BYTES * batch
    raw_bytes = -(-columns // UNIT_COLUMNS) * 2 * STEP_BYTES * batch if raw else 0
    table = TablePlace(most.open_tiles * TILE_ROWS * (ROW_BYTES + batch * 8) + _STATE_BYTES, copies)
    activation_bytes = _whole_lines(triple_bytes + raw_bytes)
    slot_size = slot_bytes(chunk_bytes)
    in_front = activation_bytes <= table.front_bytes
    front_slots = 0 if in_front else min(most.chunks, table.front_bytes // slot_size)
    behind = table.end + (0 if in_front else activation_bytes)
    room = gpu.room(blocks) - behind
    slots = 0 if room < 0 else front_slots + min(most.chunks - front_slots, room // slot_size)
    end = behind + (slots - front_slots) * slot_size
    return Plan(gpu.tuning, blocks, triple_bytes, raw_bytes, slot_size, in_front, front_slots, slots, table, end)


@functools.lru_cache(maxsize=1024)
def chunk_limit(gpu: Gpu, columns: int, raw: bool) -> int:
    """The largest chunk, in bytes, with which one vector leaves room for several; 0 if rows are too long for that.

    Fewer copies of the table leave more room, and are the second choice if chunks need not be tiny without.
    """
    limits = [_chunk_limit(gpu, columns, raw, copies) for copies in gpu.tuning.table_copies]
    return next((limit for limit in limits if limit >= gpu.tuning.smallest_chunk_bytes), max(limits))


def _chunk_limit(gpu: Gpu, columns: int, raw: bool, copies: int) -> int:
    for chunk_bytes in range(gpu.tuning.largest_chunk_bytes, 0, -_CHUNK_STEP_BYTES):
        if _plan(gpu, 1, columns, raw, chunk_bytes, 1, copies).slots >= gpu.tuning.wanted_slots:
            return chunk_bytes
    return 0


def slot_bytes(chunk_bytes: int) -> int:
    """Shared memory that a chunk takes, in bytes."""
    return _whole_lines(chunk_bytes + _SLOT_SLACK_BYTES)


def _whole_lines(size_bytes: int) -> int:
    return -(-size_bytes // _LINE_BYTES) * _LINE_BYTES
