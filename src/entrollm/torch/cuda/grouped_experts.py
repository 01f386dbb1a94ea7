"""The matrices of experts with group scales on one GPU."""

from __future__ import annotations

import ctypes
from dataclasses import replace

import torch

from entrollm.torch.cuda.experts import TASK_BYTES, ChoicesStruct, ExpertMatrices, ExpertProduct
from entrollm.torch.cuda.gpu import RESERVED_BYTES
from entrollm.torch.cuda.grouped import GroupedFields, GroupedMatrixStruct, VectorsStruct
from entrollm.torch.cuda.launch import TYPES, function
from entrollm.torch.cuda.layout import padded_columns


class GroupedPartStruct(ctypes.Structure):
    """`Part` of grouped_experts.cu."""

    _fields_ = (("matrix", GroupedMatrixStruct), ("y_begin", ctypes.c_int), ("unused", ctypes.c_int))


class GroupedExpertStruct(ctypes.Structure):
    """`Launch` of grouped_experts.cu."""

    _fields_ = (("vectors", VectorsStruct), ("parts", ctypes.c_void_p), ("choices", ChoicesStruct))


class GroupedExperts(ExpertMatrices[GroupedFields]):
    """The matrices of experts with group scales on one GPU; all have one form, and none has its columns permuted."""

    def _part_structs(self, parts: list[GroupedFields]) -> list[ctypes.Structure]:
        begins = [sum(part.rows for part in parts[:index]) for index in range(len(parts))]
        return [GroupedPartStruct(part.struct(), begin) for part, begin in zip(parts, begins, strict=True)]

    def _make_product(self, vectors: int, tasks: int, outputs: int, dtype: torch.dtype) -> ExpertProduct | None:
        gpu, part = self._gpu, self.experts[0][0]
        shared = replace(gpu.tuning, multiprocessors=max(1, gpu.multiprocessors // tasks))
        macros = part.product_macros(shared, vectors, TYPES[dtype])
        panel, panel_bytes = part.panel(gpu.block_bytes - RESERVED_BYTES - TASK_BYTES, vectors)
        end_bytes = RESERVED_BYTES + TASK_BYTES + panel_bytes
        kernel = function("grouped_experts.cu", "multiply_grouped_experts", self.device, macros, end_bytes)
        shape = VectorsStruct(columns=padded_columns(self.shape[1]), y_stride=self.shape[0], panel_steps=panel)
        struct = GroupedExpertStruct(shape, self._structs.data_ptr(), self._choices(outputs))
        return ExpertProduct(kernel, struct, struct.vectors, struct.choices, dict(macros)["THREADS"], gpu)
