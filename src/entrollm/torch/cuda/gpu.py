"""What a GPU has, and how its kernels are tuned."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch

from entrollm.torch.cuda.launch import device_attribute
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
    """The GPU that a table is made for."""
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
    properties = torch.cuda.get_device_properties(device)
    half = device_attribute(device, "MAX_SHARED_MEMORY_PER_MULTIPROCESSOR") // 2
    return Gpu(
        tuning_of((properties.major, properties.minor)),
        int(properties.multi_processor_count),
        device_attribute(device, "MAX_SHARED_MEMORY_PER_BLOCK_OPTIN"),
        half - device_attribute(device, "RESERVED_SHARED_MEMORY_PER_BLOCK"),
    )
