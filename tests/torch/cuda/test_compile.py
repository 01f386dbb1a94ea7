"""Every kernel compiles for every family of GPUs, without spills and within its shared memory; no GPU is needed."""

from __future__ import annotations

import io
import re

import pytest
import torch

from entrollm.torch.cuda.compile import Target, read_source
from entrollm.torch.cuda.decode import decode_macros
from entrollm.torch.cuda.experts import TASK_BYTES
from entrollm.torch.cuda.flat_experts import expert_plan
from entrollm.torch.cuda.flat_plan import flat_plan
from entrollm.torch.cuda.gpu import typical_gpu
from entrollm.torch.cuda.grouped import GroupedFields
from entrollm.torch.cuda.launch import TYPES
from entrollm.torch.cuda.layout import LANES
from entrollm.torch.cuda.lossless_matrix import decode_macros as lossless_decode_macros
from entrollm.torch.cuda.lossless_matrix import lossless_plan, most_vectors
from entrollm.torch.cuda.plan import plan_of
from entrollm.torch.cuda.product import product_macros
from entrollm.torch.cuda.rounding import rounding_macros
from entrollm.torch.cuda.tuning import AMPERE, FAMILIES, HOPPER, Tuning
from tests.torch.cuda.groups import random_groups

core = pytest.importorskip("cuda.core")
pytest.importorskip("cuda.bindings.nvrtc")

REGISTERS = 1 << 16  # of a multiprocessor


def usage(source: str, tuning: Tuning, macros: tuple[tuple[str, int], ...]) -> dict[str, int]:
    """What the compiler says that a kernel uses."""
    options = core.ProgramOptions(
        arch=Target(tuning.capability).architecture,
        std="c++17",
        define_macro=[(name, str(value)) for name, value in macros],
        ptxas_options="-v",
    )
    log = io.StringIO()
    core.Program(read_source(source), "c++", options).compile("cubin", logs=log)
    found = {}
    for what in ("registers", "bytes spill stores", "bytes smem", "bytes stack frame"):
        said = re.search(rf"(\d+) {what}", log.getvalue())
        assert said or what == "bytes smem"  # which is left out where there is none
        found[what] = int(said[1]) if said else 0
    return found


@pytest.mark.parametrize("tuning", FAMILIES, ids=lambda tuning: tuning.family)
def test_kernels_fit_every_family(tuning: Tuning) -> None:
    gpu = typical_gpu(tuning)
    plan = plan_of(gpu, 1, 4096, True, 8 << 10)
    product = usage("product.cu", tuning, product_macros(plan, 1, TYPES[torch.bfloat16]))
    table, macros = decode_macros(tuning)
    decode = usage("decode.cu", tuning, macros)
    for found, threads, place in ((product, plan.threads, plan.table), (decode, tuning.decode_threads, table)):
        assert found["bytes spill stores"] == found["bytes stack frame"] == 0
        assert found["registers"] * threads <= REGISTERS
        assert found["bytes smem"] <= place.state_bytes
        assert place.end < gpu.block_bytes
    symbols, groups = random_groups("q6_k", 48, 512)
    part = GroupedFields.of("tensor", torch.from_numpy(symbols), groups)
    for batch in (1, 8):
        macros = part.product_macros(tuning, batch, TYPES[torch.bfloat16])
        found = usage("grouped_product.cu", tuning, macros)
        assert found["bytes spill stores"] == 0
        assert found["registers"] * dict(macros)["THREADS"] <= REGISTERS
    for batch in (1, 32):
        flat = flat_plan(gpu, (896,), 16, 5, batch)
        assert flat.end_bytes <= gpu.block_bytes
        found = usage("flat_product.cu", tuning, flat.macros((2, 5), tuning.flat_ahead, TYPES[torch.bfloat16]))
        assert found["bytes spill stores"] == 0
        assert found["registers"] * flat.threads <= REGISTERS
    for vectors in (1, 4):
        experts = expert_plan(gpu, 96, 8, 5, vectors, 8)
        assert experts is not None and experts.end_bytes <= gpu.block_bytes
        found = usage("flat_experts.cu", tuning, experts.macros((2, 5), tuning.flat_ahead, TYPES[torch.bfloat16]))
        assert found["bytes spill stores"] == 0
        assert found["registers"] * experts.threads <= REGISTERS
        plan = plan_of(gpu, vectors, 2048, True, 4 << 10)
        found = usage("coded_experts.cu", tuning, product_macros(plan, vectors, TYPES[torch.bfloat16]))
        assert found["bytes spill stores"] <= 4
        assert found["bytes smem"] <= plan.table.state_bytes
        found = usage("grouped_experts.cu", tuning, part.product_macros(tuning, vectors, TYPES[torch.bfloat16]))
        assert found["bytes spill stores"] == 0
        assert found["bytes smem"] <= TASK_BYTES
    macros = (("TYPE", TYPES[torch.bfloat16]), ("THREADS", 256), ("MIN_BITS", 2), ("MAX_BITS", 5))
    assert usage("flat_decode.cu", tuning, macros)["bytes spill stores"] == 0
    found = usage("round_columns.cu", tuning, rounding_macros())
    assert found["bytes spill stores"] == found["bytes stack frame"] == 0
    assert usage("grouped_decode.cu", tuning, part.decode_macros(TYPES[torch.bfloat16]))["bytes spill stores"] == 0


@pytest.mark.parametrize("tuning", [AMPERE, HOPPER], ids=lambda tuning: tuning.family)
def test_lossless_kernels_fit(tuning: Tuning) -> None:
    gpu = typical_gpu(tuning)
    batch = most_vectors(torch.float32)
    plan = lossless_plan(gpu, 896, 16, batch, torch.float32)
    assert plan is not None
    found = usage("lossless_product.cu", tuning, plan.macros(batch, torch.float32))
    assert found["bytes spill stores"] == 0
    assert found["registers"] * plan.warps * LANES <= REGISTERS
    assert usage("lossless_decode.cu", tuning, lossless_decode_macros(torch.bfloat16))["bytes spill stores"] == 0
