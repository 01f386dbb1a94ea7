"""Round the columns of a block on a GPU, each compensating for the errors of those rounded before it."""

from __future__ import annotations

import ctypes
import functools

import torch
from torch import Tensor

from entrollm.quantize.rounding import BLOCK_COLUMNS
from entrollm.torch.cuda.compile import Macros
from entrollm.torch.cuda.launch import Function, function

_THREADS = 32  # few, so that all multiprocessors get some of the rows


class _Launch(ctypes.Structure):
    """`Launch` of round_columns.cu."""

    _fields_ = (
        ("left", ctypes.c_void_p),
        ("reach", ctypes.c_void_p),
        ("thresholds", ctypes.c_void_p),
        ("integers", ctypes.c_void_p),
        ("columns", ctypes.c_int),
        ("rows", ctypes.c_int),
        ("left_stride", ctypes.c_longlong),
        ("reach_stride", ctypes.c_longlong),
    )


class ColumnRounding:
    """The same as `quantize.rounding.round_columns`, bit for bit but where a number lies on a threshold.

    Args:
        device: the GPU, with its index.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def __call__(self, left: Tensor, reach: Tensor, thresholds: Tensor) -> tuple[Tensor, ...]:
        """The integers of a block; arguments as for `round_columns`, of which `left` is only read."""
        columns, rows = left.shape
        if columns > BLOCK_COLUMNS:
            raise ValueError(f"expected at most {BLOCK_COLUMNS} columns, found {columns}")
        left, reach = (array if array.stride(1) == 1 else array.contiguous() for array in (left, reach))
        integers = torch.empty(columns, rows, device=left.device)
        pointers = (array.data_ptr() for array in (left, reach, thresholds, integers))
        launch = _Launch(*pointers, columns, rows, left.stride(0), reach.stride(0))
        self._function.launch([launch], -(-rows // _THREADS), _THREADS, overlap=False)
        return (integers,)

    @functools.cached_property
    def _function(self) -> Function:
        return function("round_columns.cu", "round_columns", self._device, rounding_macros(), 0)


def rounding_macros() -> Macros:
    """What the kernel is compiled with."""
    return (("COLUMNS", BLOCK_COLUMNS), ("THREADS", _THREADS))
