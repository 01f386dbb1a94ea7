"""The flat matrices of experts on one GPU."""

from __future__ import annotations

import ctypes
from dataclasses import replace

import torch

from entrollm.torch.cuda.experts import TASK_BYTES, ChoicesStruct, ExpertMatrices, ExpertProduct
from entrollm.torch.cuda.flat import FlatPart
from entrollm.torch.cuda.flat_matrix import FlatProductStruct, matrix_struct
from entrollm.torch.cuda.flat_plan import FlatPlan, flat_plan
from entrollm.torch.cuda.gpu import Gpu
from entrollm.torch.cuda.launch import TYPES, divisor, function
from entrollm.torch.cuda.layout import padded_columns


class FlatExpertStruct(ctypes.Structure):
    """`ExpertLaunch` of flat_experts.cu."""

    _fields_ = (("product", FlatProductStruct), ("matrices", ctypes.c_void_p), ("choices", ChoicesStruct))


def expert_plan(gpu: Gpu, tiles: int, stripes: int, most_bits: int, vectors: int, tasks: int) -> FlatPlan | None:
    """Divide the product with one matrix and a few vectors, of which there are several; `None` if it does not fit.

    Args:
        gpu: the GPU.
        tiles, stripes: of a matrix.
        most_bits: of a field.
        vectors: of a product.
        tasks: about how many products share the GPU.
    """
    part = replace(gpu, multiprocessors=max(1, gpu.multiprocessors // tasks), block_bytes=gpu.block_bytes - TASK_BYTES)
    plan = flat_plan(part, (tiles,), stripes, most_bits, vectors)
    return None if plan.prepared else replace(plan, state_bytes=plan.state_bytes + TASK_BYTES)


class FlatExperts(ExpertMatrices[FlatPart]):
    """The flat matrices of experts on one GPU."""

    def _part_structs(self, parts: list[FlatPart]) -> list[ctypes.Structure]:
        begins = [sum(part.rows for part in parts[:index]) for index in range(len(parts))]
        return [matrix_struct(part, begin) for part, begin in zip(parts, begins, strict=True)]

    def _make_product(self, vectors: int, tasks: int, outputs: int, dtype: torch.dtype) -> ExpertProduct | None:
        parts = [part for parts in self.experts for part in parts]
        widths = min(part.widths[0] for part in parts), max(part.widths[1] for part in parts)
        gpu, stripes = self._gpu, parts[0].stripes
        plan = expert_plan(gpu, max(part.tiles for part in parts), stripes, widths[1], vectors, tasks)
        if plan is None:
            return None
        macros = plan.macros(widths, gpu.tuning.flat_ahead, TYPES[dtype])
        kernel = function("flat_experts.cu", "multiply_experts", self.device, macros, plan.end_bytes)
        columns = padded_columns(self.shape[1])
        product = FlatProductStruct(
            columns=columns, y_stride=self.shape[0], splits=divisor(1), shares=divisor(plan.shares)
        )
        struct = FlatExpertStruct(product, self._structs.data_ptr(), self._choices(outputs))
        return ExpertProduct(kernel, struct, struct.product, struct.choices, plan.threads, gpu)
