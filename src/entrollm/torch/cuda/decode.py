"""Launch the kernel that decodes a matrix, or some of its rows, to memory."""

from __future__ import annotations

import torch
from torch import Tensor

from entrollm.errors import UnsupportedError
from entrollm.torch.cuda.compile import Macros
from entrollm.torch.cuda.device_matrix import DeviceMatrix
from entrollm.torch.cuda.gpu import gpu_of
from entrollm.torch.cuda.launch import TYPES, DecodeStruct, divisor, function
from entrollm.torch.cuda.layout import LANES, ROW_BYTES, SPAN_COLUMNS, TILE_ROWS
from entrollm.torch.cuda.plan import TablePlace, slot_bytes
from entrollm.torch.cuda.tuning import Tuning


def decode(part: DeviceMatrix, out: Tensor, ids: Tensor | None, device: torch.device) -> None:
    """Decode a matrix to contiguous memory.

    Args:
        part: the matrix.
        out: (rows, columns), contiguous.
        ids: int64, the rows to decode, each within the matrix; `None` for all.
        device: the GPU.
    Raises:
        UnsupportedError: not even one chunk fits in shared memory.
    """
    gpu = gpu_of(device)
    tuning = gpu.tuning
    slot_size = slot_bytes(part.chunks.largest_bytes)
    table, macros = decode_macros(tuning)
    slots = min(tuning.decode_slots, (gpu.block_bytes - table.end) // slot_size)
    if slots < 1:
        raise UnsupportedError(f"{part.name}: a chunk of {slot_size} bytes does not fit this GPU's shared memory")
    items = part.shape.tiles if ids is None else len(ids)
    struct = DecodeStruct(
        matrix=part.struct(),
        rows=None if ids is None else ids.data_ptr(),
        positions=part.positions.data_ptr(),
        out=out.data_ptr(),
        items=items,
        columns=part.shape.columns,
        type=TYPES[out.dtype],
        slots=divisor(slots),
        slot_bytes=slot_size,
    )
    kernel = function("decode.cu", "decode", device, macros, table.end + slots * slot_size)
    kernel.launch([struct], min(items, gpu.multiprocessors), tuning.decode_threads, overlap=False)


def decode_macros(tuning: Tuning) -> tuple[TablePlace, Macros]:
    """Where the table is, and what the compiler must know."""
    stage = tuning.decode_threads // LANES * SPAN_COLUMNS
    # `State` of decode.cu, at most: a stage for each warp, the rows of each slot's tile, and the ring.
    state_bytes = (stage + tuning.decode_slots * ROW_BYTES) * TILE_ROWS + (2 << 10)
    table = TablePlace(state_bytes, tuning.table_copies[0])
    return table, (("THREADS", tuning.decode_threads), ("SLOTS", tuning.decode_slots), *table.macros())
