"""The models of generate.py in transformers: its `generate` with a static cache, ours, and prompts of 2,048 tokens."""

from __future__ import annotations

import functools
import gc
import itertools
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import Tensor, nn

import entrollm.hf
from entrollm.format.blocks import Blocks
from entrollm.format.code import Code, Leaf
from entrollm.format.grid import GridKind
from entrollm.format.spec import TensorSpec
from entrollm.hf import CodedWeight
from entrollm.torch.layers import put_weight, watch_inputs
from entrollm.torch.matrix import Matrix
from gemv import DEVICE

PROMPT_TOKENS, NEW_TOKENS, CACHE_TOKENS = 128, 128, 512
PREFILL_TOKENS = 2048
REPEATS = 3
Make = Callable[[int, int], Matrix]


class GivenWeight(CodedWeight):
    """A coded weight whose matrix is in GPU memory already, and of which there is no stored form."""

    def __init__(self, matrix: Matrix) -> None:
        rows, columns = matrix.shape
        spec = TensorSpec(rows, columns, "BF16", "random", Code(Leaf(128), 0), Blocks(1, columns), GridKind(1.0, 0.0))
        super().__init__("random", spec, {}, torch.bfloat16, DEVICE)
        self._given = matrix

    def matrix(self) -> Matrix:
        """The matrix."""
        return self._given


def build(kind: str, make: Make | None, **sizes: Any) -> Any:
    """A model with random weights; `make` gives the coded matrices that take the place of its linear layers'."""
    config = getattr(transformers, f"{kind}Config")(
        **sizes, max_position_embeddings=8192, bos_token_id=None, eos_token_id=None, pad_token_id=0
    )
    with torch.device(DEVICE):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    if make is not None:
        for path, layer in list(model.named_modules()):
            if type(layer) is nn.Linear:
                put_weight(model, f"{path}.weight", GivenWeight(make(layer.out_features, layer.in_features)))
        watch_inputs(model)
    return model


class _Clock:
    """A streamer that notes when tokens come; they are on the host by then, with ours one token later."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, tokens: Tensor) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass


def time_tokens(generate: Callable[..., Any], **options: Any) -> dict[str, Any]:
    """Tokens per second of a way to generate, by the median time between tokens, after two calls to warm up."""
    tokens = torch.randint(2, 1000, (1, PROMPT_TOKENS), device=DEVICE)

    def run() -> tuple[float, list[float]]:
        clock = _Clock()
        begin = time.perf_counter()
        generate(
            tokens,
            attention_mask=torch.ones_like(tokens),
            max_new_tokens=NEW_TOKENS,
            do_sample=False,
            streamer=clock,
            **options,
        )
        # The prompt is put first, then each token.
        times = clock.times[1:]
        return time.perf_counter() - begin, [b - a for a, b in itertools.pairwise(times[2:])]

    counters = torch._dynamo.utils.counters
    counters.clear()
    first_s = run()[0]
    run()
    runs = [run() for _ in range(REPEATS)]
    rates = [1 / statistics.median(steps) for _, steps in runs]
    return {
        "tokens_per_s": statistics.median(rates),
        "min": min(rates),
        "max": max(rates),
        "whole_call_tokens_per_s": NEW_TOKENS / min(whole for whole, _ in runs),
        "first_call_s": first_s,
        "graphs": counters["stats"]["unique_graphs"],
        "graph_breaks": sum(counters["graph_break"].values()),
        "cudagraph_skips": counters["inductor"]["cudagraph_skips"],
    }


def prefill(model: Any) -> dict[str, float]:
    """Milliseconds that a prompt takes, the logits of its last token included."""
    tokens = torch.randint(2, 1000, (1, PREFILL_TOKENS), device=DEVICE)
    times = []
    with torch.no_grad():
        for _ in range(2 + 2 * REPEATS):
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            model(tokens, logits_to_keep=1)
            end.record()
            end.synchronize()
            times.append(begin.elapsed_time(end))
    return {"median_ms": statistics.median(times[2:]), "min_ms": min(times[2:]), "max_ms": max(times[2:])}


def measure(kind: str, make: Make | None, eager: bool, sizes: dict[str, int]) -> dict[str, Any]:
    """All figures of one model, which is gone from the GPU afterwards."""
    before = torch.cuda.memory_allocated(DEVICE)
    model = build(kind, make, **sizes)
    gc.collect()
    found: dict[str, Any] = {"held_bytes": torch.cuda.memory_allocated(DEVICE) - before}
    found["prefill"] = prefill(model)
    if eager:
        found["eager"] = time_tokens(model.generate)
    found["static"] = time_tokens(model.generate, cache_implementation="static", max_cache_len=CACHE_TOKENS)
    found["fast"] = time_tokens(functools.partial(entrollm.hf.generate, model), max_cache_len=CACHE_TOKENS)
    del model
    torch._dynamo.reset()
    gc.collect()
    torch.cuda.empty_cache()
    return found
