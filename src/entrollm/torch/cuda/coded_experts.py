"""The coded matrices of experts on one GPU."""

from __future__ import annotations

import ctypes

import torch

from entrollm.torch.cuda.device_matrix import DeviceMatrix
from entrollm.torch.cuda.experts import ChoicesStruct, ExpertMatrices, ExpertProduct
from entrollm.torch.cuda.launch import TYPES, ProductStruct, function
from entrollm.torch.cuda.layout import padded_columns
from entrollm.torch.cuda.plan import plan_of
from entrollm.torch.cuda.product import product_macros, product_struct


class CodedExpertStruct(ctypes.Structure):
    """`ExpertLaunch` of coded_experts.cu."""

    _fields_ = (("product", ProductStruct), ("matrices", ctypes.c_void_p), ("choices", ChoicesStruct))


class CodedExperts(ExpertMatrices[DeviceMatrix]):
    """The coded matrices of experts on one GPU."""

    def _part_structs(self, parts: list[DeviceMatrix]) -> list[ctypes.Structure]:
        begins = [sum(part.rows for part in parts[:index]) for index in range(len(parts))]
        return [part.struct(begin) for part, begin in zip(parts, begins, strict=True)]

    def _make_product(self, vectors: int, tasks: int, outputs: int, dtype: torch.dtype) -> ExpertProduct | None:
        parts = [part for parts in self.experts for part in parts]
        columns, raw = padded_columns(self.shape[1]), any(part.code.raw_bits for part in parts)
        plan = plan_of(self._gpu, vectors, columns, raw, max(part.chunks.largest_bytes for part in parts))
        if not plan.fits:
            return None
        macros = product_macros(plan, vectors, TYPES[dtype])
        kernel = function("coded_experts.cu", "multiply_coded_experts", self.device, macros, plan.end_bytes)
        product = product_struct(plan, columns, y_stride=self.shape[0])
        struct = CodedExpertStruct(product, self._structs.data_ptr(), self._choices(outputs))
        return ExpertProduct(kernel, struct, struct.product, struct.choices, plan.threads, self._gpu)
