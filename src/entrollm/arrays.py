"""Where arrays live: in NumPy, or on another device whose library has functions of the same names.

Arithmetic that runs on both is written in the functions and methods that NumPy and torch share. torch itself is
imported in `hf/` alone; its functions are found by way of its tensors.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from entrollm.processes import ALONE, Group
from entrollm.system import memory_bytes

Array = Any
"""A NumPy array or a torch tensor."""


def functions(array: Array) -> Any:
    """The module whose functions take `array`: NumPy or torch."""
    return np if isinstance(array, np.ndarray) else sys.modules["torch"]


def like(array: Array, values: NDArray[Any]) -> Array:
    """Copy `values` to where `array` lives, in their own type; NumPy arrays are returned as they are."""
    return values if isinstance(array, np.ndarray) else functions(array).asarray(values, device=array.device)


def double(array: Array) -> Array:
    """`array` in float64; a new array if it was in another type."""
    xp = functions(array)
    return xp.asarray(array, dtype=xp.float64)


def single(array: Array) -> Array:
    """`array` in float32; a new array if it was in another type."""
    xp = functions(array)
    return xp.asarray(array, dtype=xp.float32)


def solve_positive(matrix: Array, values: Array) -> Array:
    """The x with matrix @ x = values.

    Args:
        matrix: float64, shape (n, n), symmetric and positive definite.
        values: float64, shape (n,).
    """
    if isinstance(matrix, np.ndarray):
        return np.linalg.solve(matrix, values)
    torch = functions(matrix)
    factor, failed = torch.linalg.cholesky_ex(matrix)
    if failed:  # by rounding
        return torch.linalg.solve(matrix, values)
    return torch.cholesky_solve(values[:, None], factor)[:, 0]


class Device(Protocol):
    """A place for arrays.

    Attributes:
        name: for people.
        spare: the share of free memory that a computation may take to be faster.
        group: the processes that share the computation.
    """

    @property
    def name(self) -> str: ...

    @property
    def spare(self) -> float: ...

    @property
    def group(self) -> Group: ...

    def put(self, values: NDArray[Any]) -> Array:
        """A new array on the device, in float32, of values in float32, float16 or bfloat16."""

    def take(self, array: Array) -> NDArray[Any]:
        """An array of the device as a NumPy array."""

    def zeros(self, *shape: int) -> Array:
        """A new array of zeros, in float32."""

    def memory(self) -> int:
        """Bytes that a model may take."""

    def guard(self) -> AbstractContextManager[None]:
        """Inside of it, running out of the device's memory is an EntroLLMError."""

    def run(self, function: Callable[..., tuple[Array, ...]], *arrays: Array) -> tuple[Array, ...]:
        """What `function` gives of `arrays`; it may change them, and depends on nothing else but their shapes.

        The results are valid until the next run.
        """


class _Host:
    """The memory of this machine, which other processes share."""

    name = "this machine"
    spare = 0.0

    def __init__(self, group: Group = ALONE) -> None:
        self.group = group

    def put(self, values: NDArray[Any]) -> Array:
        return values.astype(np.float32)

    def take(self, array: Array) -> NDArray[Any]:
        taken: NDArray[Any] = array
        return taken

    def zeros(self, *shape: int) -> Array:
        return np.zeros(shape, np.float32)

    def memory(self) -> int:
        return memory_bytes() // self.group.neighbors

    def guard(self) -> AbstractContextManager[None]:
        return nullcontext()

    def run(self, function: Callable[..., tuple[Array, ...]], *arrays: Array) -> tuple[Array, ...]:
        return function(*arrays)


HOST: Device = _Host()


def shared_host(group: Group) -> Device:
    """`HOST` for a group of processes."""
    return _Host(group)
