"""The matrices of a layer's experts on one GPU: one launch multiplies by those that have been chosen there."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from typing import Any, Generic

import torch
from torch import Tensor

from entrollm.torch.cuda.gpu import Gpu, gpu_of
from entrollm.torch.cuda.launch import TYPES, DivisorStruct, Function, aligned, divisor
from entrollm.torch.cuda.parted import PartT

MOST_OUTPUTS = 128
"""Vectors of outputs of one launch at most; kMostOutputs of expert_tasks.cuh."""
TASK_BYTES = 768
"""Shared memory of `Task` in expert_tasks.cuh, with up to 16 vectors."""


class ChoicesStruct(ctypes.Structure):
    """`Choices` of expert_tasks.cuh."""

    _fields_ = (
        ("chosen", ctypes.c_void_p),
        ("experts", ctypes.c_int),
        ("outputs", ctypes.c_int),
        ("parts", DivisorStruct),
        ("shared", DivisorStruct),
    )


class ExpertProduct:
    """The product with experts for a number of vectors of outputs of one type.

    Args:
        function: the kernel.
        struct: its argument, in which calls fill in vectors and choices.
        vectors: the part of it that has x and y.
        choices: the part of it that has choices.
        threads: of a block.
        gpu: the GPU.
    """

    def __init__(
        self, function: Function, struct: ctypes.Structure, vectors: Any, choices: Any, threads: int, gpu: Gpu
    ) -> None:
        self._function = function
        self._struct, self._vectors, self._choices = struct, vectors, choices
        self._threads = threads
        self._overlaps = gpu.tuning.overlaps
        # Every task has a block, even if all outputs choose different experts.
        self._grid = max(gpu.multiprocessors, choices.outputs * choices.parts.value)

    def __call__(self, x: Tensor, chosen: Tensor, y: Tensor) -> None:
        """Multiply `x` into `y`, both contiguous and of the product's type; rows of `x` are padded."""
        self._vectors.x = x.data_ptr()
        self._vectors.y = y.data_ptr()
        self._choices.chosen = chosen.data_ptr()
        self._choices.shared = divisor(len(y) // len(x))
        self._function.launch([self._struct], self._grid, self._threads, self._overlaps)


class ExpertMatrices(Generic[PartT]):
    """The matrices of experts on one GPU.

    Args:
        experts: the matrices of each expert, one below the other, of the same shapes for all experts.
        device: the GPU.
    """

    def __init__(self, experts: list[list[PartT]], device: torch.device) -> None:
        self.experts = experts
        self.device = device
        self.shape = (sum(part.rows for part in experts[0]), experts[0][0].columns)
        structs = [bytes(struct) for parts in experts for struct in self._part_structs(parts)]
        self._structs = torch.frombuffer(bytearray(b"".join(structs)), dtype=torch.uint8).to(device)
        self._products: dict[tuple[int, int, torch.dtype], ExpertProduct | None] = {}

    def takes(self, tokens: int, choices: int, dtype: torch.dtype) -> bool:
        """Whether a launch takes that many choices of each of some tokens, and vectors of this type."""
        return tokens * choices <= MOST_OUTPUTS and dtype in TYPES and self._product(tokens, choices, dtype) is not None

    def multiply(self, x: Tensor, chosen: Tensor) -> Tensor:
        """Multiply by the matrices of chosen experts, which `takes` has agreed to.

        Args:
            x: (inputs, in_features) in float32, bfloat16 or float16: one input for each token, or for each choice.
            chosen: integers (tokens, choices), the experts of each token; numbers that no expert has mean none.
        Returns:
            (tokens * choices, out_features) in the type of x, with zeros where no expert is chosen.
        """
        y = x.new_empty(chosen.numel(), self.shape[0])
        tokens, choices = chosen.shape
        product = self._product(tokens, choices, x.dtype) if chosen.numel() else None
        if product is not None:
            product(aligned(x), chosen.to(torch.int64).contiguous(), y)
        return y

    def _product(self, tokens: int, choices: int, dtype: torch.dtype) -> ExpertProduct | None:
        key = tokens, choices, dtype
        if key not in self._products:
            made = (self._make_product(*how, tokens * choices, dtype) for how in self._divisions(tokens, choices))
            self._products[key] = next((product for product in made if product is not None), None)
        return self._products[key]

    def _divisions(self, tokens: int, choices: int) -> Iterator[tuple[int, int]]:
        """Vectors that a block may take at a time, the best number first, and about how many tasks there are then."""
        count, outputs = len(self.experts), tokens * choices
        different = count * (1 - (1 - 1 / count) ** outputs)  # experts, on average
        most = 1 if tokens == 1 else 2 if outputs < count else 4
        for vectors in (4, 2, 1):
            if vectors <= most:
                tasks = (outputs if vectors == 1 else different) * len(self.experts[0])
                yield vectors, max(1, round(tasks))

    def _choices(self, outputs: int) -> ChoicesStruct:
        return ChoicesStruct(experts=len(self.experts), outputs=outputs, parts=divisor(len(self.experts[0])))

    def _part_structs(self, parts: list[PartT]) -> list[ctypes.Structure]:
        """The matrices of an expert as kernels take them."""
        raise NotImplementedError

    def _make_product(self, vectors: int, tasks: int, outputs: int, dtype: torch.dtype) -> ExpertProduct | None:
        """The product with `vectors` vectors at a time and about `tasks` tasks; `None` if it does not fit."""
        raise NotImplementedError

    @property
    def _gpu(self) -> Gpu:
        return gpu_of(self.device)
