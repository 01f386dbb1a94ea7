"""Calibration's arrays as torch tensors, on a GPU or on the processor."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import ml_dtypes
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from entrollm.errors import EntroLLMError, Message, Option, UnsupportedError
from entrollm.processes import ALONE, Group
from entrollm.quantize.rounding import round_columns
from entrollm.system import memory_bytes
from entrollm.torch.cuda.compile import check_installed
from entrollm.torch.cuda.rounding import ColumnRounding
from entrollm.torch.cuda.tuning import MIN_CAPABILITY

_ON_THE_PROCESSOR = Message("calibrate on the processor, with {}", Option("device", "cpu"))

Function = Callable[..., tuple[Tensor, ...]]


class TorchDevice:
    """A device of torch; see `entrollm.arrays.Device`. On a GPU, products of float32 are as exact as torch makes them.

    Args:
        kind: "cuda", or "cpu" to compare with.
        group: the processes that share the computation.
    Raises:
        UnsupportedError: torch finds no GPU.
    """

    def __init__(self, kind: str = "cuda", group: Group = ALONE) -> None:
        self.group = group
        self._device = torch.device(kind)
        self._is_cuda = self._device.type == "cuda"
        if self._is_cuda:
            check_gpu()
            self._device = torch.device(kind, torch.cuda.current_device())
        self.name = torch.cuda.get_device_name(self._device) if self._is_cuda else "this machine"
        self.spare = 0.5 if self._is_cuda else 0.0
        self._kernels = _kernels(self._device) if self._is_cuda else {}
        self._recordings: dict[tuple[Function, tuple[torch.Size, ...]], _Recording] = {}

    @property
    def place(self) -> torch.device:
        """Where its tensors are."""
        return self._device

    def put(self, values: NDArray[Any]) -> Tensor:
        """A new float32 tensor; 16-bit types are widened on the device."""
        is_bfloat16 = values.dtype == ml_dtypes.bfloat16
        with warnings.catch_warnings():
            # Mapped files cannot be written, and nothing writes to what is only copied from.
            warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
            view = torch.from_numpy(values.view(np.int16) if is_bfloat16 else values)
        return (view.view(torch.bfloat16) if is_bfloat16 else view).to(self._device, copy=True).float()

    def take(self, array: Tensor) -> NDArray[Any]:
        """A tensor as a NumPy array, its elements in order."""
        if not self._is_cuda:
            taken: NDArray[Any] = array.contiguous().numpy()
            return taken
        # Memory that the GPU writes to by itself, and that torch keeps for the next time, takes a fraction of the time.
        held = torch.empty(array.shape, dtype=array.dtype, pin_memory=True)
        copied: NDArray[Any] = held.copy_(array).numpy()
        return copied

    def zeros(self, *shape: int) -> Tensor:
        """A new float32 tensor of zeros."""
        return torch.zeros(shape, device=self._device)

    def memory(self) -> int:
        """Free bytes of the GPU, those that torch keeps for later included, or those of the machine."""
        if self._is_cuda:
            kept = torch.cuda.memory_reserved(self._device) - torch.cuda.memory_allocated(self._device)
            return int(torch.cuda.mem_get_info(self._device)[0]) + kept
        return memory_bytes() // self.group.neighbors

    @contextmanager
    def guard(self) -> Iterator[None]:
        """Name the device that is too small.

        Raises:
            EntroLLMError: its memory is full.
        """
        try:
            yield
        except torch.OutOfMemoryError as error:
            full = f"{self.name} has too little memory"
            hint = Message("use {} ({})", Option("device", "cpu"), error)
            raise EntroLLMError(full, hint=hint) from None

    def run(self, function: Function, *arrays: Tensor) -> tuple[Tensor, ...]:
        """Call a function, or the kernel that a GPU has in its place.

        Without a kernel, a GPU records the many small operations the first time, and replays them after that.
        """
        if not self._is_cuda:
            return function(*arrays)
        if function in self._kernels:
            return self._kernels[function](*arrays)
        key = (function, tuple(array.shape for array in arrays))
        if key not in self._recordings:
            self._recordings[key] = _Recording(function, arrays)
        return self._recordings[key](arrays)


def _kernels(device: torch.device) -> dict[Function, Function]:
    """Kernels by the functions that they replace; none for older GPUs, or without the packages that compile them."""
    if torch.cuda.get_device_capability(device) < MIN_CAPABILITY:
        return {}
    try:
        check_installed()
    except UnsupportedError:
        return {}
    return {round_columns: ColumnRounding(device)}


class _Recording:
    """A CUDA graph of a function of tensors of fixed shapes."""

    def __init__(self, function: Function, arrays: tuple[Tensor, ...]) -> None:
        self._inputs = [array.clone() for array in arrays]
        function(*self._inputs)  # libraries set themselves up, which cannot be recorded
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._outputs = function(*self._inputs)

    def __call__(self, arrays: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        for held, array in zip(self._inputs, arrays, strict=True):
            held.copy_(array)
        self._graph.replay()
        return self._outputs


def check_gpu() -> None:
    """Check that there is a GPU.

    Raises:
        UnsupportedError: torch finds none.
    """
    if torch.version.cuda is None:
        raise UnsupportedError(
            f"torch {torch.__version__} is built without CUDA",
            hint=Message("install one that is made for your GPU, or {}", _ON_THE_PROCESSOR),
        )
    if not torch.cuda.is_available():
        raise UnsupportedError(
            f"torch {torch.__version__} finds no GPU",
            hint=Message("check the driver with nvidia-smi, or {}", _ON_THE_PROCESSOR),
        )
