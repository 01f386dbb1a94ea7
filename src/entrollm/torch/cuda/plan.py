"""Where a product keeps what in a block's shared memory."""

from __future__ import annotations

import functools
from dataclasses import dataclass

from entrollm.torch.cuda.shape import GROUP_COLUMNS, STEP_COLUMNS, TILE_ROWS, UNIT_COLUMNS

PRODUCT_THREADS = 768
# The table lies at the second multiple of its size; the system and the kernels' variables take the first bytes of what
# is in front of it.
_TABLE_BYTES = 32 << 10
_RESERVED_BYTES = 1 << 10
# Where it ends at most, counted from the first byte that a kernel chooses the use of.
TABLE_END = 2 * _TABLE_BYTES - _RESERVED_BYTES
_STATE_BYTES = 2 << 10  # without what is kept of open tiles
# Slots for chunks; with fewer, warps wait for memory.
_FEWEST_SLOTS = 3
_WANTED_SLOTS = 4
_STEP_BYTES = 64
# Words are read this far behind a chunk's streams.
_SLOT_SLACK = 256
_LARGEST_CHUNK = 32 << 10
# What a multiprocessor asks for before it reads x: what comes from memory in the meantime. With more, x comes last.
_EARLY_BYTES = 20 << 10
_CHUNK_STEP = 512


@dataclass(frozen=True)
class Plan:
    """How a product uses a multiprocessor: where a block keeps what in shared memory, in bytes from its start."""

    blocks: int  # of a multiprocessor
    triple_bytes: int
    raw_bytes: int
    slot_bytes: int
    in_front: bool
    front_slots: int
    slots: int
    shared_bytes: int

    @property
    def threads(self) -> int:
        """Of a block."""
        return PRODUCT_THREADS // self.blocks

    @property
    def early(self) -> int:
        """Chunks to ask for before x is read."""
        return max(1, _EARLY_BYTES // self.blocks // self.slot_bytes)

    @property
    def fits(self) -> bool:
        """Whether warps need not wait for each chunk; two blocks share a multiprocessor only where all chunks fit."""
        return self.blocks > 1 or self.slots >= _FEWEST_SLOTS


@functools.lru_cache(maxsize=1024)
def plan_of(batch: int, columns: int, raw: bool, chunk_bytes: int, available: int, blocks: int = 1) -> Plan:
    """Share out the shared memory of a block.

    Args:
        batch: vectors.
        raw: whether symbols have raw bits.
        chunk_bytes: of the largest chunk.
        available: bytes that the block may use.
        blocks: of a multiprocessor.
    """
    triple_bytes = -(-columns // GROUP_COLUMNS) * (GROUP_COLUMNS // STEP_COLUMNS) * _STEP_BYTES * batch
    raw_bytes = -(-columns // UNIT_COLUMNS) * 2 * _STEP_BYTES * batch if raw else 0
    open_tiles, most_slots = (16, 12) if batch <= 4 else (8, 6)
    static_bytes = open_tiles * TILE_ROWS * (12 + batch * 8) + _STATE_BYTES
    activation_bytes = _whole_lines(triple_bytes + raw_bytes)
    slot_size = slot_bytes(chunk_bytes)
    front = _TABLE_BYTES - _RESERVED_BYTES - static_bytes
    in_front = activation_bytes <= front
    front_slots = 0 if in_front else min(most_slots, front // slot_size)
    behind = TABLE_END + (0 if in_front else activation_bytes)
    room = available - static_bytes - behind
    slots = 0 if room < 0 else front_slots + min(most_slots - front_slots, room // slot_size)
    used = behind + (slots - front_slots) * slot_size
    return Plan(blocks, triple_bytes, raw_bytes, slot_size, in_front, front_slots, slots, used)


@functools.lru_cache(maxsize=1024)
def chunk_limit(columns: int, raw: bool, available: int) -> int:
    """Bytes of the largest chunk with which a vector leaves room for several, or 0: then rows are too long."""
    for chunk_bytes in range(_LARGEST_CHUNK, 0, -_CHUNK_STEP):
        if plan_of(1, columns, raw, chunk_bytes, available).slots >= _WANTED_SLOTS:
            return chunk_bytes
    return 0


def slot_bytes(chunk_bytes: int) -> int:
    """What a chunk takes in shared memory."""
    return _whole_lines(chunk_bytes + _SLOT_SLACK)


def _whole_lines(size_bytes: int) -> int:
    """Round up to what a warp reads at once, which slots begin at multiples of."""
    return -(-size_bytes // 128) * 128
