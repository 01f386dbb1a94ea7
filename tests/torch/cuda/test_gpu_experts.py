"""Products with experts that are chosen on the GPU, against float64, and models with layers of experts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import entrollm.hf
from entrollm import compress
from entrollm.torch.backend import Backend
from entrollm.torch.cuda.coded_experts import CodedExperts
from entrollm.torch.cuda.device_matrix import transcode
from entrollm.torch.cuda.experts import ExpertMatrices
from entrollm.torch.cuda.flat import pack_flat
from entrollm.torch.cuda.flat_experts import FlatExperts
from entrollm.torch.cuda.grouped import GroupedFields
from entrollm.torch.cuda.grouped_experts import GroupedExperts
from entrollm.torch.stack import CodedStack
from tests.checkpoint.imported.test_mxfp4 import write_source
from tests.torch.cuda.gpu_checks import check_in_graph, with_scales
from tests.torch.cuda.groups import random_groups
from tests.torch.models import difference, ids, logits, write_coded

DEVICE = torch.device("cuda", 0)

pytestmark = pytest.mark.usefixtures("gpu")

# (experts, rows of the parts of each, columns)
SHAPES = [
    (5, (33,), 100),
    (16, (96, 96), 512),
    (8, (300,), 2048),
    (4, (700, 40), 4096),
    (3, (64,), 14336),
    (4, (768, 768), 2048),
    (3, (2048,), 768),
]


def made(
    count: int, rows: tuple[int, ...], columns: int, is_flat: bool = True
) -> tuple[ExpertMatrices[Any], np.ndarray]:
    """Experts on the GPU, and the same dense in float64: (experts, rows, columns)."""
    rng = np.random.default_rng(count)
    experts: list[list[Any]] = []
    dense = []
    for expert in range(count):
        parts, weights = [], []
        for size in rows:
            deviation = rng.uniform(0.5, 1.5, (size, 1)) * (1 + expert % 3)
            symbols = np.clip(np.rint(rng.standard_t(6, (size, columns)) * deviation) + 128, 0, 255).astype(np.uint8)
            scales, values = with_scales(symbols, scaled_columns=expert % 2 == 1)
            parts.append((pack_flat if is_flat else transcode)("tensor", *scales))
            weights.append(values)
        experts.append(parts)
        dense.append(np.concatenate(weights))
    return (FlatExperts if is_flat else CodedExperts)(experts, DEVICE), np.stack(dense)


def made_grouped(name: str, count: int, rows: tuple[int, ...], columns: int) -> tuple[GroupedExperts, np.ndarray]:
    """The same with group scales."""
    experts: list[list[GroupedFields]] = []
    dense = []
    for expert in range(count):
        parts, weights = [], []
        for part, size in enumerate(rows):
            symbols, groups = random_groups(name, size, columns, seed=expert * len(rows) + part)
            parts.append(GroupedFields.of(name, torch.from_numpy(symbols).cuda(), groups))
            weights.append(groups.apply(symbols.astype(np.float32), slice(None)).astype(np.float64))
        experts.append(parts)
        dense.append(np.concatenate(weights))
    return GroupedExperts(experts, DEVICE), np.stack(dense)


def expected(x: torch.Tensor, chosen: torch.Tensor, dense: np.ndarray) -> np.ndarray:
    vectors = x.double().cpu().numpy().repeat(chosen.numel() // len(x), 0)
    found = np.zeros((chosen.numel(), dense.shape[1]))
    for output, expert in enumerate(chosen.reshape(-1).tolist()):
        if 0 <= expert < len(dense):
            found[output] = dense[expert] @ vectors[output]
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("tokens", "choices"), [(1, 1), (1, 4), (3, 2), (8, 8), (16, 2), (64, 2)])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("is_flat", [True, False])
def test_products_match_float64(
    is_flat: bool, shape: tuple[int, tuple[int, ...], int], tokens: int, choices: int, dtype: torch.dtype
) -> None:
    check_products(*made(*shape, is_flat), tokens, choices, dtype)


@pytest.mark.parametrize(("tokens", "choices"), [(1, 4), (3, 2), (8, 8)])
@pytest.mark.parametrize("name", ["gptq", "compressed-tensors", "q6_k", "q8_0", "e4m3"])
@pytest.mark.parametrize("shape", [(5, (33,), 512), (16, (96, 96), 1024), (3, (64,), 14336)])
def test_grouped_products_match_float64(
    shape: tuple[int, tuple[int, ...], int], name: str, tokens: int, choices: int
) -> None:
    # Products do not round weights to the arithmetic of their source, which costs up to 2^-9 of a weight.
    limit = 4e-3 if name == "compressed-tensors" else 1e-3
    check_products(*made_grouped(name, *shape), tokens, choices, torch.float32, limit)


def check_products(
    experts: ExpertMatrices[Any],
    dense: np.ndarray,
    tokens: int,
    choices: int,
    dtype: torch.dtype,
    limit: float = 1e-3,
) -> None:
    count, _, columns = dense.shape
    generator = torch.Generator().manual_seed(0)
    # Some numbers that no expert has.
    chosen = torch.randint(-1, count + 1, (tokens, choices), generator=generator).cuda()
    for inputs in {tokens, tokens * choices}:
        x = torch.randn(inputs, columns, generator=generator).to(DEVICE, dtype)
        assert experts.takes(tokens, choices, dtype)
        y = experts.multiply(x, chosen)
        wanted = expected(x, chosen, dense)
        assert y.dtype == dtype and y.shape == wanted.shape
        unchosen = (chosen.reshape(-1) < 0) | (chosen.reshape(-1) >= count)
        assert not y[unchosen].any()
        error = np.linalg.norm(y.double().cpu().numpy() - wanted)
        assert error <= {torch.float32: limit, torch.bfloat16: 8e-3}[dtype] * np.linalg.norm(wanted)


@pytest.mark.parametrize("is_flat", [True, False])
def test_all_tokens_choose_one_expert(is_flat: bool) -> None:
    experts, dense = made(16, (96, 96), 512, is_flat)
    for expert, integers in ((0, torch.int64), (15, torch.int32)):
        chosen = torch.full((64, 2), expert, dtype=integers, device=DEVICE)
        x = torch.randn(64, 512, device=DEVICE)
        wanted = expected(x, chosen, dense)
        found = experts.multiply(x, chosen).double().cpu().numpy()
        assert np.linalg.norm(found - wanted) < 1e-3 * np.linalg.norm(wanted)


def test_what_a_launch_does_not_take() -> None:
    experts, _ = made(5, (33,), 100)
    assert not experts.takes(65, 2, torch.float32)
    assert not experts.takes(1, 2, torch.float64)
    assert experts.multiply(torch.zeros(0, 100, device=DEVICE), torch.zeros(0, 2).long().cuda()).shape == (0, 33)


@pytest.mark.parametrize("is_flat", [True, False])
def test_choices_change_between_replays_of_a_graph(is_flat: bool) -> None:
    """Kernels overlap in a graph; each must still see what the one before it wrote."""
    experts, dense = made(8, (512,), 512, is_flat)
    x, chosen = torch.randn(4, 512, device=DEVICE), torch.zeros(4, 2, dtype=torch.int64, device=DEVICE)

    def chain() -> torch.Tensor:
        y = x
        for turn in range(10):
            y = experts.multiply(y, (chosen + turn) % 8).reshape(4, 2, -1).sum(1)
            y = y / y.norm()
        return y

    check_in_graph(chain)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=torch.cuda.Stream()):
        y = experts.multiply(x, chosen)
    for seed in range(5):
        chosen.copy_(torch.randint(0, 9, (4, 2), generator=torch.Generator().manual_seed(seed)))
        graph.replay()
        wanted = expected(x, chosen, dense)
        assert np.linalg.norm(y.double().cpu().numpy() - wanted) < 1e-3 * np.linalg.norm(wanted)


MODELS: dict[str, dict[str, Any]] = {
    "Qwen3MoeConfig": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "head_dim": 16},
    "MixtralConfig": {"num_local_experts": 4, "num_experts_per_tok": 2},
}


@pytest.mark.parametrize("backend", ["fast", "auto"])
@pytest.mark.parametrize("config", MODELS)
def test_models_choose_their_experts_on_the_gpu(config: str, backend: Backend, tmp_path: Path) -> None:
    folder = write_coded(tmp_path, config=config, **MODELS[config])
    model = entrollm.hf.load(folder, dtype=torch.float32, device=DEVICE, backend=backend)
    stacks = [module for module in model.modules() if isinstance(module, CodedStack)]
    assert len(stacks) == 4 and all(stack.is_together(torch.float32) for stack in stacks)
    slow = entrollm.hf.load(folder, dtype=torch.float32)
    for count, batch in ((1, 1), (1, 5), (12, 2), (70, 1)):
        tokens = ids(count, batch)
        assert difference(logits(model, tokens.cuda()).cpu(), logits(slow, tokens)) < 2e-3
    assert all(layer.mlp.experts.runs_together for layer in model.model.layers)
    tokens = ids()
    options: dict[str, Any] = {"max_new_tokens": 16, "do_sample": False}
    wanted = slow.generate(tokens, attention_mask=torch.ones_like(tokens), **options)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    for _ in range(2):
        found = entrollm.hf.generate(model, tokens.cuda(), attention_mask=torch.ones_like(tokens).cuda(), **options)
        assert torch.equal(found.cpu(), wanted)
    stats = torch._dynamo.utils.counters
    assert not stats["graph_break"] and not stats["inductor"]["cudagraph_skips"]


def test_gpt_oss_chooses_its_experts_on_the_gpu(tmp_path: Path) -> None:
    """Its experts have group scales and biases."""
    compress(write_source(tmp_path / "source"), tmp_path / "coded")
    model = entrollm.hf.load(tmp_path / "coded", dtype=torch.float32, device=DEVICE)
    slow = entrollm.hf.load(tmp_path / "coded", dtype=torch.float32)
    for count, batch in ((1, 1), (1, 5), (12, 2), (70, 1)):
        tokens = ids(count, batch) % 96
        assert difference(logits(model, tokens.cuda()).cpu(), logits(slow, tokens)) < 2e-3
    assert all(layer.mlp.experts.runs_together for layer in model.model.layers)
