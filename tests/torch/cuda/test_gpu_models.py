"""transformers on GPUs against the engine on the CPU."""

from __future__ import annotations

import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import entrollm
import entrollm.hf
from entrollm import CompressOptions, compress
from entrollm.torch.backend import Backend
from entrollm.torch.cuda import FlatCudaMatrix
from entrollm.torch.weight import CodedWeight
from tests.support.paths import TINY_LLAMA

TOKENS = 64


@pytest.fixture(scope="module")
def folders(gpu: torch.device, tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    folder = tmp_path_factory.mktemp("example")
    for bits in (4, 8):
        compress(TINY_LLAMA, folder / str(bits), CompressOptions(bits=bits))
    compress(TINY_LLAMA, folder / "5", CompressOptions(bits=5, prefer="speed"))
    return {bits: folder / str(bits) for bits in (4, 5, 8)}


def expected_tokens(folder: Path) -> tuple[list[int], list[int]]:
    engine = entrollm.load(folder)
    prompt = engine.encode("The history of the city")
    return prompt, list(engine.generate(prompt, max_tokens=TOKENS, temperature=0.0).token_ids)


def greedy(model: Any, prompt: list[int], **options: Any) -> list[int]:
    tokens = torch.tensor([prompt], device=model.device)
    found = model.generate(
        tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=TOKENS, do_sample=False, **options
    )
    return found[0, len(prompt) :].tolist()


@pytest.mark.parametrize("bits", [4, 8])
def test_greedy_tokens_are_those_of_the_engine(bits: int, folders: dict[int, Path], gpu: torch.device) -> None:
    prompt, expected = expected_tokens(folders[bits])
    model = entrollm.hf.load(folders[bits], dtype=torch.float32, device=gpu)
    assert greedy(model, prompt) == expected
    assert greedy(model, prompt, cache_implementation="static", disable_compile=True) == expected


@pytest.mark.parametrize("bits", [4, 5])
def test_flat_matrices_generate_the_same_tokens(bits: int, folders: dict[int, Path], gpu: torch.device) -> None:
    """Those of a file with flat codes are flat in any case, others with the back end for it."""
    prompt, expected = expected_tokens(folders[bits])
    backend: Backend = "fast" if bits == 4 else "auto"
    model = entrollm.hf.load(folders[bits], dtype=torch.float32, device=gpu, backend=backend)
    weights = [module for module in model.modules() if isinstance(module, CodedWeight)]
    assert all(isinstance(weight.matrix(), FlatCudaMatrix) for weight in weights)
    assert greedy(model, prompt) == expected
    assert greedy(model, prompt, cache_implementation="static") == expected


def test_layers_with_one_input_share_a_launch(folders: dict[int, Path], gpu: torch.device) -> None:
    model = entrollm.hf.load(folders[8], dtype=torch.bfloat16, device=gpu)
    for batch in (1, 3, 8):
        tokens = torch.arange(2, 2 + batch, device=gpu)[:, None]
        found = []
        for _ in range(3):
            with torch.no_grad():
                found.append(model(tokens, use_cache=False).logits)
        # The first call multiplies apart, the others together.
        assert torch.equal(found[0], found[1])
        assert torch.equal(found[0], found[2])
        model = entrollm.hf.load(folders[8], dtype=torch.bfloat16, device=gpu)


def test_static_cache_runs_in_cuda_graphs(folders: dict[int, Path], gpu: torch.device) -> None:
    """Compiled with CUDA graphs by transformers; each call has a cache of its own, elsewhere in memory."""
    prompt, expected = expected_tokens(folders[8])
    model = entrollm.hf.load(folders[8], dtype=torch.float32, device=gpu)
    for _ in range(4):
        assert greedy(model, prompt, cache_implementation="static") == expected
    stats = torch._dynamo.utils.counters
    assert not stats["graph_break"]
    assert not stats["inductor"]["cudagraph_skips"]


class Heard:
    """A streamer that keeps the tokens."""

    def __init__(self) -> None:
        self.tokens: list[int] = []

    def put(self, tokens: torch.Tensor) -> None:
        self.tokens += tokens.flatten().tolist()

    def end(self) -> None:
        pass


def test_stops_are_seen_late_but_not_passed(folders: dict[int, Path], gpu: torch.device) -> None:
    prompt, expected = expected_tokens(folders[8])
    model = entrollm.hf.load(folders[8], dtype=torch.float32, device=gpu)
    tokens = torch.tensor([prompt], device=gpu)
    for last in (TOKENS - 1, 20, 0, 41):
        heard = Heard()
        options = {"eos_token_id": expected[last], "pad_token_id": 0} if last < TOKENS - 1 else {"eos_token_id": None}
        found = entrollm.hf.generate(
            model,
            tokens,
            attention_mask=torch.ones_like(tokens),
            max_new_tokens=TOKENS,
            do_sample=False,
            streamer=heard,
            **options,
        )
        count = expected.index(expected[last]) + 1 if last < TOKENS - 1 else TOKENS
        assert found[0, len(prompt) :].tolist() == expected[:count]
        assert heard.tokens == prompt + expected[:count]
    assert model._compiled_call is not None
    # Sequences that end at their own time.
    both = torch.cat([tokens, tokens.roll(1, dims=1)])
    options = {"attention_mask": torch.ones_like(both), "do_sample": False, "max_new_tokens": TOKENS}
    options |= {"eos_token_id": [expected[20], expected[41]], "pad_token_id": 0}
    assert torch.equal(entrollm.hf.generate(model, both, **options), model.generate(both, **options))


def test_memory_is_that_of_the_coded_weights(folders: dict[int, Path], gpu: torch.device) -> None:
    """Within 5 % and 2 MB, which allocations of small tensors round up to, of what the matrices and norms take."""
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated(gpu)
    model = entrollm.hf.load(folders[4], dtype=torch.bfloat16, device=gpu)
    model(torch.ones(1, 4, dtype=torch.long, device=gpu))
    coded = sum(module.matrix().size_bytes for module in model.modules() if isinstance(module, CodedWeight))
    used = torch.cuda.memory_allocated(gpu) - before
    stored = sum(path.stat().st_size for path in folders[4].glob("*.safetensors"))
    print(f"GPU {used} bytes, layout {coded}, file {stored}")
    assert coded < 1.5 * stored  # tiles of 384 columns are short for the layout
    assert used < 1.05 * coded + (2 << 20)


def test_layers_on_two_gpus(folders: dict[int, Path], two_gpus: None) -> None:
    prompt, expected = expected_tokens(folders[8])
    count = len(entrollm.hf.load(folders[8]).model.layers)
    places = {"model.embed_tokens": 0, "model.norm": 1, "model.rotary_emb": 0, "lm_head": 0}
    places |= {f"model.layers.{i}": int(i >= count // 2) for i in range(count)}
    model = entrollm.hf.load(folders[8], dtype=torch.float32, device_map=places)
    assert greedy(model, prompt) == expected


def test_two_processes_share_the_matrices(folders: dict[int, Path], two_gpus: None, tmp_path: Path) -> None:
    worker = Path(__file__).parent / "gpu_worker.py"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(port)]
    subprocess.run([*command, str(worker), str(folders[8]), str(tmp_path)], check=True, timeout=240)
    model = entrollm.hf.load(folders[8], dtype=torch.float32, device="cuda:0")
    tokens = torch.arange(2, 22, device="cuda:0")[None]
    with torch.no_grad():
        expected = model(tokens).logits.cpu()
    continued = model.generate(tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=16, do_sample=False)
    answers = [torch.load(tmp_path / f"rank{rank}.pt") for rank in range(2)]
    assert {answer["device"] for answer in answers} == {"cuda:0", "cuda:1"}
    for answer in answers:
        assert (answer["logits"] - expected).abs().max() < 2e-3 * expected.abs().max()
        assert torch.equal(answer["tokens"], continued.cpu())
