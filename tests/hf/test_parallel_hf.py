"""Several devices: device maps of accelerate, and tensor parallelism over two processes."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.integrations.accelerate import compute_module_sizes, infer_auto_device_map

import entrollm.hf
from entrollm import _core
from entrollm.errors import UnsupportedError
from entrollm.format.reader import CompressedModel
from entrollm.hf import CodedWeight, EntroConfig, parallel
from entrollm.matrix import matrix_of
from entrollm.torch.native import open_native
from entrollm.torch.parallel import PartCutter, without_entries
from tests.support.paths import ROOT
from tests.torch.models import difference, ids, logits, write_coded


@pytest.fixture(scope="module")
def experts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    options = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "head_dim": 16}
    return write_coded(tmp_path_factory.mktemp("experts"), config="Qwen3MoeConfig", **options)


@pytest.fixture(scope="module")
def ranks(coded: Path, coded_untied: Path, experts: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    """What two processes say that share each of the models."""
    out = tmp_path_factory.mktemp("ranks")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    workers = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.hf.parallel_worker", str(out), str(coded), str(coded_untied), str(experts)],
            env=os.environ
            | {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
            | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "CUDA_VISIBLE_DEVICES": ""},
            stderr=subprocess.PIPE,
            cwd=ROOT,
            text=True,
        )
        for rank in range(2)
    ]
    for worker in workers:
        _, errors = worker.communicate(timeout=240)
        assert worker.returncode == 0, errors[-4000:]
    return [torch.load(out / f"rank{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("name", ["coded", "coded_untied", "experts"])
def test_two_processes_say_what_one_says(name: str, ranks: list[Any], request: pytest.FixtureRequest) -> None:
    folder = request.getfixturevalue(name)
    model = entrollm.hf.load(folder, dtype=torch.float32)
    expected = logits(model, ids(batch=2))
    tokens = model.generate(ids(), attention_mask=torch.ones_like(ids()), max_new_tokens=8, do_sample=False)
    for rank in ranks:
        found = rank[folder.parent.name]
        assert difference(found["logits"], expected) < 1e-3
        assert torch.equal(found["tokens"], tokens)
        assert "holds a part of the model only" in found["refusal"]


def test_processes_share_the_matrices_out(ranks: list[Any], coded_untied: Path, experts: Path) -> None:
    shapes = [rank[coded_untied.parent.name]["shapes"] for rank in ranks]
    for shape in shapes:
        assert shape["model.layers.0.self_attn.q_proj.weight"] == (48, 96)
        assert shape["model.layers.0.mlp.down_proj.weight"] == (96, 64)
    assert [shape["lm_head.weight"] for shape in shapes] == [(154, 96), (153, 96)]
    served = [
        {name for name in rank[experts.parent.name]["shapes"] if "layers.0.mlp.experts" in name} for rank in ranks
    ]
    assert not served[0] & served[1]
    assert len(served[0]) == len(served[1]) == 2 * 3


@pytest.mark.parametrize(("rank", "size"), [(0, 2), (2, 3)])
@pytest.mark.parametrize("style", ["colwise", "rowwise"])
def test_parts_have_the_weights_of_the_whole(coded: Path, style: str, rank: int, size: int) -> None:
    with CompressedModel.open(coded) as stored:
        pool = _core.ThreadPool(1)
        for name, spec in list(stored.specs.items())[:5]:
            weight = without_entries(stored, name, torch.float32)
            weight.anchor = torch.empty(0)
            PartCutter(stored, rank, size).fill(weight, parallel.axis_of(name, style))
            whole = matrix_of(stored, name).dequantize(np.arange(spec.rows), pool)
            axis = 0 if style == "colwise" else 1
            step = -(-whole.shape[axis] // size)
            expected = (
                whole[rank * step : (rank + 1) * step] if axis == 0 else whole[:, rank * step : (rank + 1) * step]
            )
            part = open_native(name, weight.spec, weight.entries())
            assert np.array_equal(part.dequantize(np.arange(part.spec.rows), pool), expected)


def test_scales_of_rows_are_cut_too(coded: Path, tmp_path: Path) -> None:
    AutoModelForCausalLM.from_pretrained(
        coded.parent / "source", quantization_config=EntroConfig(bits=4, granularity="row")
    ).save_pretrained(tmp_path)
    test_parts_have_the_weights_of_the_whole(tmp_path, "colwise", 2, 3)
    test_parts_have_the_weights_of_the_whole(tmp_path, "rowwise", 2, 3)


def test_plans_that_cannot_be_followed_are_refused(coded: Path) -> None:
    with CompressedModel.open(coded) as stored:
        weight = without_entries(stored, "model.layers.0.mlp.up_proj.weight", torch.float32)
        with pytest.raises(
            UnsupportedError, match=r"up_proj\.weight: the plan splits it in the style 'packed_colwise'"
        ):
            parallel.axis_of(weight.name, "packed_colwise")
        with pytest.raises(ValueError, match="128 cannot be split over 129 processes; use fewer"):
            PartCutter(stored, 128, 129).fill(weight, parallel.axis_of(weight.name, "colwise"))
    with pytest.raises(UnsupportedError, match="which its kind of layer cannot follow"):
        parallel.check_whole("router", "colwise")
    sizes = {"tp_size": 1, "pp_size": 2, "ep_size": 1, "dp_size": 1}
    model = SimpleNamespace(config=SimpleNamespace(distributed_config=SimpleNamespace(**sizes)))
    with pytest.raises(UnsupportedError, match="no parallelism of the kind pp"):
        parallel.is_parallel(model)


DEVICES = {
    "model.embed_tokens": "cpu",
    "model.layers.0": "cpu",
    "model.layers.1": "disk",
    "model.norm": "cpu",
    "model.rotary_emb": "cpu",
    "lm_head": "cpu",
}


@pytest.mark.parametrize("offload_buffers", [False, True])
def test_device_map_with_hooks(coded: Path, tmp_path: Path, offload_buffers: bool) -> None:
    options = {"offload_folder": tmp_path / "offload", "offload_buffers": offload_buffers}
    model = AutoModelForCausalLM.from_pretrained(coded, dtype=torch.float32, device_map=DEVICES, **options)
    assert model.model.layers[1].mlp.up_proj.weight.coded.is_meta == offload_buffers
    expected = entrollm.hf.load(coded, dtype=torch.float32)
    for count in (12, 1, 1, 12):
        assert torch.equal(logits(model, ids(count)), logits(expected, ids(count)))
    with pytest.raises(UnsupportedError, match=r"layers\.1.* is offloaded; load the model without offloading to save"):
        model.save_pretrained(tmp_path / "saved")


def test_offloaded_experts(experts: Path, tmp_path: Path) -> None:
    options = {"offload_folder": tmp_path, "offload_buffers": True}
    model = AutoModelForCausalLM.from_pretrained(experts, dtype=torch.float32, device_map=DEVICES, **options)
    expected = entrollm.hf.load(experts, dtype=torch.float32)
    for count in (12, 1):
        assert torch.equal(logits(model, ids(count)), logits(expected, ids(count)))


def test_automatic_device_map(coded: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(coded, dtype=torch.float32, device_map="auto")
    assert torch.equal(logits(model, ids()), logits(entrollm.hf.load(coded, dtype=torch.float32), ids()))


def test_sizes_for_device_maps_are_those_of_the_coded_bytes(coded_untied: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(coded_untied, dtype=torch.bfloat16)
    found = compute_module_sizes(model, model.hf_quantizer)[0][""]
    with CompressedModel.open(coded_untied) as stored:
        entries = sum(array.nbytes for name in stored.specs for array in stored.entries(name).values())
        entries += sum(stored.array(name).nbytes for name in stored.plain)
    assert found == pytest.approx(entries, rel=0.01)


def test_entries_of_a_matrix_stay_together(coded_untied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A device map for two small devices, which no machine needs to have."""
    model = AutoModelForCausalLM.from_pretrained(coded_untied, dtype=torch.bfloat16)
    memory = {0: 60_000, 1: 10**9}
    monkeypatch.setattr("transformers.integrations.accelerate.get_max_memory", lambda given: dict(given))
    placed = infer_auto_device_map(
        model, memory, no_split_module_classes=model._no_split_modules, hf_quantizer=model.hf_quantizer
    )
    assert set(placed.values()) == {0, 1}
    for path, module in model.named_modules():
        if isinstance(module, CodedWeight):
            homes = [key for key in placed if path == key or path.startswith(key + ".")]
            assert len(homes) == 1, (path, json.dumps(placed))
