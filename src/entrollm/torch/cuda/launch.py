"""Structs that the kernels take, and how they are launched."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from typing import Any

import torch

from entrollm.errors import EntroLLMError

TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
MAX_MATRICES = 4


class DivisorStruct(ctypes.Structure):
    """`Divisor` of common.cuh."""

    _fields_ = (("value", ctypes.c_int), ("inverse", ctypes.c_uint))


def divisor(value: int) -> DivisorStruct:
    """A number that kernels divide by."""
    return DivisorStruct(value, -(-(1 << 31) // value))


class MatrixStruct(ctypes.Structure):
    """`Matrix` of common.cuh."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("chunks", ctypes.c_void_p),
        ("table", ctypes.c_void_p),
        ("column_scale", ctypes.c_void_p),
        ("bounds", ctypes.c_void_p),
        ("rows", ctypes.c_int),
        ("tiles", ctypes.c_int),
        ("groups", ctypes.c_int),
        ("tile_chunks", DivisorStruct),
        ("segments", DivisorStruct),
        ("raw_bits", ctypes.c_int),
        ("base", ctypes.c_int),
        ("y_begin", ctypes.c_int),
        ("cta_begin", ctypes.c_int),
        ("cta_count", DivisorStruct),
    )


class ProductStruct(ctypes.Structure):
    """`Launch` of product.cu."""

    _fields_ = (
        ("matrices", MatrixStruct * MAX_MATRICES),
        ("x", ctypes.c_void_p),
        ("y", ctypes.c_void_p),
        ("count", ctypes.c_int),
        ("columns", ctypes.c_int),
        ("y_stride", ctypes.c_int),
        ("slots", DivisorStruct),
        ("slot_bytes", ctypes.c_int),
        ("triple_bytes", ctypes.c_int),
        ("raw_bytes", ctypes.c_int),
        ("in_front", ctypes.c_int),
        ("front_slots", ctypes.c_int),
        ("early", ctypes.c_int),
    )


class DecodeStruct(ctypes.Structure):
    """`Launch` of decode.cu."""

    _fields_ = (
        ("matrix", MatrixStruct),
        ("rows", ctypes.c_void_p),
        ("places", ctypes.c_void_p),
        ("out", ctypes.c_void_p),
        ("items", ctypes.c_int),
        ("columns", ctypes.c_int),
        ("type", ctypes.c_int),
        ("slots", DivisorStruct),
        ("slot_bytes", ctypes.c_int),
    )


@functools.cache
def shared_bytes(device: torch.device) -> int:
    """Shared memory that a block may use on a device."""
    return _attribute(device, "MAX_SHARED_MEMORY_PER_BLOCK_OPTIN")


@functools.cache
def shared_bytes_of_half(device: torch.device) -> int:
    """Shared memory that a block may use where two share a multiprocessor."""
    whole = _attribute(device, "MAX_SHARED_MEMORY_PER_MULTIPROCESSOR")
    return whole // 2 - _attribute(device, "RESERVED_SHARED_MEMORY_PER_BLOCK")


def _attribute(device: torch.device, name: str) -> int:
    from cuda.bindings import driver

    attribute = getattr(driver.CUdevice_attribute, f"CU_DEVICE_ATTRIBUTE_{name}")
    return int(_check(driver.cuDeviceGetAttribute(attribute, driver.CUdevice(device.index))))


class Function:
    """A compiled kernel that may use a given amount of dynamic shared memory."""

    def __init__(self, kernel: Any, device: torch.device, shared_bytes: int) -> None:
        from cuda.bindings import driver

        self._driver = driver
        self._kernel = kernel
        self._handle = driver.CUfunction(int(kernel.handle))
        self._shared_bytes = shared_bytes
        self._device = device
        attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        _check(driver.cuKernelSetAttribute(attribute, shared_bytes, kernel.handle, driver.CUdevice(device.index)))

    def launch(self, arguments: Sequence[Any], grid: int, threads: int, overlap: bool) -> None:
        """Launch on torch's current stream.

        Args:
            arguments: ctypes values, as the kernel declares them.
            overlap: let it begin while the kernel before it in the stream still runs; the kernel waits by itself
                before it touches anything that others write.
        """
        driver = self._driver
        config = driver.CUlaunchConfig()
        config.gridDimX = grid
        config.gridDimY = config.gridDimZ = 1
        config.blockDimX = threads
        config.blockDimY = config.blockDimZ = 1
        config.sharedMemBytes = self._shared_bytes
        config.hStream = driver.CUstream(torch.cuda.current_stream(self._device).cuda_stream)
        if overlap:
            attribute = driver.CUlaunchAttribute()
            attribute.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
            attribute.value.programmaticStreamSerializationAllowed = 1
            config.attrs = [attribute]
            config.numAttrs = 1
        pointers = (ctypes.c_void_p * len(arguments))(*(ctypes.addressof(argument) for argument in arguments))
        with torch.cuda.device(self._device):  # the driver launches on the current device
            _check(driver.cuLaunchKernelEx(config, self._handle, ctypes.addressof(pointers), 0))


def _check(result: tuple[Any, ...]) -> Any:
    """What a call of the driver returned.

    Raises:
        EntroLLMError: the call failed.
    """
    if int(result[0]) != 0:
        raise EntroLLMError(f"a CUDA call failed: {result[0].name}")
    return result[1] if len(result) > 1 else None
