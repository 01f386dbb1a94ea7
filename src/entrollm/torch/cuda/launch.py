"""The arguments of kernels, and how kernels are launched."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from entrollm.errors import EntroLLMError
from entrollm.torch.cuda import compile as kernels

TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
"""The numbers by which kernels know types."""
MAX_MATRICES = 4
"""Matrices that one product takes; kMaxMatrices of common.cuh."""


class DivisorStruct(ctypes.Structure):
    """`Divisor` of common.cuh."""

    _fields_ = (("value", ctypes.c_int), ("inverse", ctypes.c_uint))


def divisor(value: int) -> DivisorStruct:
    """Prepare a number that kernels divide by."""
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
        ("spans", ctypes.c_int),
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
        ("positions", ctypes.c_void_p),
        ("out", ctypes.c_void_p),
        ("items", ctypes.c_int),
        ("columns", ctypes.c_int),
        ("type", ctypes.c_int),
        ("slots", DivisorStruct),
        ("slot_bytes", ctypes.c_int),
    )


def device_attribute(device: torch.device, name: str) -> int:
    """What the driver says about a GPU; `name` is that of a CU_DEVICE_ATTRIBUTE."""
    from cuda.bindings import driver

    attribute = getattr(driver.CUdevice_attribute, f"CU_DEVICE_ATTRIBUTE_{name}")
    return int(_check(driver.cuDeviceGetAttribute(attribute, driver.CUdevice(device.index))))


@functools.cache
def function(source: str, name: str, device: torch.device, macros: kernels.Macros, end_bytes: int) -> Function:
    """Get the kernel `name` of kernels/`source` for a GPU, compiled with some macros.

    Args:
        source, name: the kernel.
        device: the GPU.
        macros: names and values.
        end_bytes: where the shared memory that a block uses ends.
    Raises:
        UnsupportedError: the GPU is too old, or the compiler is missing or fails.
    """
    with torch.cuda.device(device):
        return Function(kernels.kernel(source, name, target_of(device), macros), device, end_bytes)


def target_of(device: torch.device) -> kernels.Target:
    """What kernels are compiled for on a GPU.

    Raises:
        UnsupportedError: ENTROLLM_CUDA_TARGET names a newer capability than the GPU has, or none.
    """
    return kernels.Target.chosen(torch.cuda.get_device_capability(device))


class Function:
    """A compiled kernel whose blocks use shared memory up to an address."""

    def __init__(self, kernel: Any, device: torch.device, end_bytes: int) -> None:
        from cuda.bindings import driver

        self._driver = driver
        self._kernel = kernel
        self._handle = driver.CUfunction(int(kernel.handle))
        self._device = device
        on, attributes = driver.CUdevice(device.index), driver.CUfunction_attribute
        static = _check(driver.cuKernelGetAttribute(attributes.CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES, kernel.handle, on))
        self._shared_bytes = max(0, end_bytes - static)
        dynamic = attributes.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        _check(driver.cuKernelSetAttribute(dynamic, self._shared_bytes, kernel.handle, on))

    def launch(self, arguments: Sequence[Any], grid: int, threads: int, overlap: bool) -> None:
        """Launch on torch's current stream.

        Args:
            arguments: ctypes values, as the kernel declares them.
            grid: blocks.
            threads: threads of a block.
            overlap: whether it may begin while the previous kernel of the stream still runs. The kernel itself then
                waits before it touches anything that others write.
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
    """The result of a call of the driver.

    Raises:
        EntroLLMError: the call failed.
    """
    if int(result[0]) != 0:
        raise EntroLLMError(f"a CUDA call failed: {result[0].name}")
    return result[1] if len(result) > 1 else None


def aligned(x: Tensor) -> Tensor:
    """Vectors as the kernels read them: contiguous, from a multiple of 16 bytes on, of a multiple of 4 values."""
    if x.shape[1] % 4:
        x = torch.nn.functional.pad(x, (0, -x.shape[1] % 4))
    x = x.contiguous()
    return x.clone() if x.data_ptr() % 16 else x
