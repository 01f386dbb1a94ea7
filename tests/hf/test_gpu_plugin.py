"""Compressed folders on NVIDIA GPUs, by plain operations and by the kernels; skipped where there is none."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import entrollm.hf
from entrollm.hf import CodedWeight, EntroConfig
from tests.torch.models import difference, ids, logits

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
KERNELS = pytest.param(
    "auto",
    marks=pytest.mark.skipif(
        importlib.util.find_spec("entrollm.torch.cuda") is None or importlib.util.find_spec("cuda") is None,
        reason="needs the CUDA kernels and cuda-core",
    ),
)


def on_gpu(folder: Path, backend: Any, **options: Any) -> Any:
    return entrollm.hf.load(folder, device="cuda", backend=backend, dtype=torch.float32, **options)


def greedy(model: Any) -> torch.Tensor:
    tokens = ids().to(model.device)
    found: torch.Tensor = model.generate(
        tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=16, do_sample=False
    )
    return found.cpu()


@pytest.mark.parametrize("backend", ["plain", KERNELS])
@pytest.mark.parametrize("name", ["coded", "coded_untied"])
def test_gpu_says_what_the_cpu_says(name: str, backend: Any, request: pytest.FixtureRequest) -> None:
    folder = request.getfixturevalue(name)
    expected = entrollm.hf.load(folder, dtype=torch.float32)
    model = on_gpu(folder, backend)
    for count in (1, 12, 100):
        tokens = ids(count, batch=2)
        assert difference(logits(model, tokens.cuda()).cpu(), logits(expected, tokens)) < 2e-3
    assert torch.equal(greedy(model), greedy(expected))


@pytest.mark.parametrize("backend", ["plain", KERNELS])
def test_moves_and_saving(coded: Path, backend: Any, tmp_path: Path) -> None:
    model = entrollm.hf.load(coded, dtype=torch.float32, backend=backend)
    expected = logits(model, ids())
    model.to("cuda")
    assert difference(logits(model, ids().cuda()).cpu(), expected) < 2e-3
    model.save_pretrained(tmp_path)
    model.to("cpu")
    assert torch.equal(logits(model, ids()), expected)
    assert torch.equal(logits(entrollm.hf.load(tmp_path, dtype=torch.float32, backend=backend), ids()), expected)


@pytest.mark.parametrize("backend", [KERNELS])
def test_kernels_leave_the_stored_form_on_the_host(coded: Path, backend: Any) -> None:
    for model in (
        on_gpu(coded, backend),
        AutoModelForCausalLM.from_pretrained(
            coded.parent / "source", device_map={"": 0}, quantization_config=EntroConfig()
        ),
    ):
        weights = [module for module in model.modules() if isinstance(module, CodedWeight)]
        assert weights
        assert {entry.device.type for weight in weights for entry in weight.entries().values()} == {"cpu"}
        assert {weight.device.type for weight in weights} == {"cuda"}


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("backend", ["plain", KERNELS])
def test_two_gpus_share_the_layers(coded: Path, backend: Any) -> None:
    places = {"model.embed_tokens": 0, "model.layers.0": 0, "model.layers.1": 1, "model.norm": 1, "model.rotary_emb": 0}
    model = entrollm.hf.load(coded, dtype=torch.float32, backend=backend, device_map={**places, "lm_head": 1})
    expected = logits(entrollm.hf.load(coded, dtype=torch.float32), ids())
    assert difference(logits(model, ids().cuda(0)).cpu(), expected) < 2e-3
