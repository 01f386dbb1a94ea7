"""What a GPU has, and how its kernels are tuned."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace

import torch

from entrollm.torch.cuda.launch import device_attribute, target_of
from entrollm.torch.cuda.tuning import HOPPER, Tuning, tuning_of

RESERVED_BYTES = 1 << 10
"""Shared memory that CUDA takes of each block, since compute capability 8.0."""


@dataclass(frozen=True)
class Gpu:
    """A GPU, as far as the layout and the plans of kernels depend on it.

    Attributes:
        tuning: the table of its family.
        multiprocessors: their number.
        block_bytes: shared memory that a block may use.
        shared_block_bytes: the same where two blocks share a multiprocessor.
    """

    tuning: Tuning
    multiprocessors: int
    block_bytes: int
    shared_block_bytes: int

    def room(self, blocks: int) -> int:
        """Shared memory that a block may use where this number of blocks, 1 or 2, share a multiprocessor, in bytes."""
        return self.block_bytes if blocks == 1 else self.shared_block_bytes


def typical_gpu(tuning: Tuning) -> Gpu:
    """A GPU of a family, with as many multiprocessors as its table says."""
    whole = tuning.multiprocessor_bytes
    return Gpu(tuning, tuning.multiprocessors, whole - RESERVED_BYTES, whole // 2 - RESERVED_BYTES)


@functools.cache
def gpu_of(device: torch.device) -> Gpu:
    """The GPU that a device is. On the CPU, where the layout can be made but not used, it is a Hopper GPU.

    Raises:
        UnsupportedError: it is older than all families that the kernels are tuned for.
    """
    if device.type != "cuda":
        return typical_gpu(HOPPER)
    tuning = tuning_of(target_of(device).capability)
    whole = min(tuning.multiprocessor_bytes, device_attribute(device, "MAX_SHARED_MEMORY_PER_MULTIPROCESSOR"))
    # The GPU's own number, of which a family has several.
    count = int(torch.cuda.get_device_properties(device).multi_processor_count)
    return typical_gpu(replace(tuning, multiprocessors=count, multiprocessor_bytes=whole))
