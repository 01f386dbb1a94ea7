"""Tokens per second at batch 1 of Llama-shaped models, coded against bfloat16: a loop of our own, and transformers.

    python benchmarks/cuda/generate.py --json results.json
    python benchmarks/cuda/generate.py --models Mistral-7B --parts transformers --hf-entropies 1.47,2.2 --eager

The loop is one CUDA graph for each token. In transformers it is `generate` with a static cache, which it compiles with
CUDA graphs, and the time of a prompt of 2,048 tokens. Weights are random integers of a stated entropy; matrices of one
shape hold the same ones in memory of their own.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from hf_model import measure
from torch import Tensor
from torch.nn import functional

from entrollm.hf.cuda.matrix import CudaMatrix, DeviceMatrix, transcode
from gemv import DEVICE, REPLAYS, commit, gaussian_deviation

CONTEXT = 512
Product = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Shape:
    """A Llama's sizes."""

    name: str
    kind: str
    hidden: int
    inner: int
    layers: int
    heads: int
    kv_heads: int
    vocabulary: int

    def sizes(self) -> dict[str, Any]:
        """The same for a configuration of transformers."""
        return {
            "hidden_size": self.hidden,
            "intermediate_size": self.inner,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "vocab_size": self.vocabulary,
        } | ({"sliding_window": None} if self.kind == "Mistral" else {})


SHAPES = (
    Shape("Llama-3-8B", "Llama", 4096, 14336, 32, 32, 8, 128256),
    Shape("Mistral-7B", "Mistral", 4096, 14336, 32, 32, 8, 32768),
)
ENTROPIES = (1.47, 2.2, 3.2)


class Step:
    """One token through the model, with a cache of fixed size: all on the GPU, so a graph can hold it."""

    def __init__(self, shape: Shape, matrix: Callable[[int, int], Product]) -> None:
        self._shape = shape
        head_dim = shape.hidden // shape.heads
        self._sizes = [shape.heads * head_dim, shape.kv_heads * head_dim, shape.kv_heads * head_dim]
        self._layers = [
            (
                matrix(sum(self._sizes), shape.hidden),
                matrix(shape.hidden, shape.hidden),
                matrix(2 * shape.inner, shape.hidden),
                matrix(shape.hidden, shape.inner),
            )
            for _ in range(shape.layers)
        ]
        self._head = matrix(shape.vocabulary, shape.hidden)
        self._embedding = torch.randn(1024, shape.hidden, device=DEVICE).bfloat16()
        self._norm = torch.ones(shape.hidden, device=DEVICE).bfloat16()
        cache = (shape.layers, 2, 1, shape.kv_heads, CONTEXT, head_dim)
        self._cache = torch.zeros(cache, device=DEVICE, dtype=torch.bfloat16)
        angles = torch.arange(CONTEXT)[:, None] / 10000 ** (torch.arange(0, head_dim, 2) / head_dim)
        self._cosine = angles.cos().repeat(1, 2).to(DEVICE).bfloat16()
        self._sine = angles.sin().repeat(1, 2).to(DEVICE).bfloat16()
        self.token = torch.zeros(1, dtype=torch.long, device=DEVICE)
        self.position = torch.full((1,), 128, dtype=torch.long, device=DEVICE)

    def __call__(self) -> None:
        """Put the likeliest next token in the place of the token."""
        x = self._embedding[self.token]
        mask = (torch.arange(CONTEXT, device=DEVICE) <= self.position)[None, None, None]
        for i, (qkv, output, gate_up, down) in enumerate(self._layers):
            q, k, v = (
                part.reshape(1, -1, 1, self._cache.shape[-1]) for part in qkv(self._normed(x)).split(self._sizes, dim=1)
            )
            self._cache[i, 0].index_copy_(2, self.position, self._rotated(k))
            self._cache[i, 1].index_copy_(2, self.position, v)
            mixed = functional.scaled_dot_product_attention(
                self._rotated(q), self._cache[i, 0], self._cache[i, 1], mask, enable_gqa=True
            )
            x = x + output(mixed.reshape(1, -1))
            gate, up = gate_up(self._normed(x)).chunk(2, dim=1)
            x = x + down(functional.silu(gate) * up)
        self.token.copy_(self._head(self._normed(x)).argmax(1) % len(self._embedding))

    def _normed(self, x: Tensor) -> Tensor:
        return functional.rms_norm(x, x.shape[-1:], self._norm, 1e-5)

    def _rotated(self, x: Tensor) -> Tensor:
        first, second = x.chunk(2, dim=-1)
        return x * self._cosine[self.position] + torch.cat([-second, first], -1) * self._sine[self.position]


def rate(step: Step) -> dict[str, float]:
    """Tokens per second from replays of a graph."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        step()
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        step()
    rates = []
    for _ in range(REPLAYS + 2):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        with torch.cuda.stream(stream):
            begin.record()
            for _ in range(4):
                graph.replay()
            end.record()
        end.synchronize()
        rates.append(4000 / begin.elapsed_time(end))
    rates = rates[2:]
    return {"tokens_per_s": statistics.median(rates), "min": min(rates), "max": max(rates)}


def dense(rows: int, columns: int) -> Product:
    """A bfloat16 matrix of its own."""
    weight = torch.randn(rows, columns, device=DEVICE, dtype=torch.bfloat16) * columns**-0.5
    return lambda x: functional.linear(x, weight)


class Coded:
    """Makes coded matrices: the first of a shape is packed, the others are copies of it."""

    def __init__(self, entropy: float) -> None:
        self._deviation = gaussian_deviation(entropy)
        self._made: dict[tuple[int, int], DeviceMatrix] = {}
        self.bytes = self.weights = 0

    def __call__(self, rows: int, columns: int) -> CudaMatrix:
        """A coded matrix of its own."""
        first = self._made.get((rows, columns))
        if first is None:
            symbols = torch.empty(rows, columns, dtype=torch.uint8, device=DEVICE)
            for i in range(0, rows, 8192):
                part = torch.randn(min(8192, rows - i), columns, device=DEVICE).mul_(self._deviation).round_().add_(128)
                symbols[i : i + 8192] = part.clamp_(0, 255).to(torch.uint8)
            scale = torch.full((rows,), columns**-0.5 / self._deviation, device=DEVICE)
            first = self._made[rows, columns] = transcode("weights", symbols, scale, scale * -128)
        packed = replace(first.packed, data=first.packed.data.clone())
        matrix = CudaMatrix.from_parts([replace(first, packed=packed)], DEVICE)
        self.bytes += matrix.size_bytes
        self.weights += rows * columns
        return matrix

    @property
    def bits(self) -> float:
        """Per weight, with everything that stays in GPU memory."""
        return self.bytes * 8 / self.weights


def run_loop(shape: Shape, entropies: list[float]) -> list[dict[str, Any]]:
    """Our own loop in a CUDA graph."""
    results = []
    baseline = rate(Step(shape, dense))
    print(f"{shape.name}: bfloat16 {baseline['tokens_per_s']:.1f} tokens/s", flush=True)
    for entropy in entropies:
        coded = Coded(entropy)
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated(DEVICE)
        ours = rate(Step(shape, lambda rows, columns, made=coded: made(rows, columns).multiply))
        held = torch.cuda.memory_allocated(DEVICE) - before
        print(
            f"  {coded.bits:.3f} bits: {ours['tokens_per_s']:.1f} tokens/s ({ours['min']:.1f} - {ours['max']:.1f}), "
            f"x bfloat16 {ours['tokens_per_s'] / baseline['tokens_per_s']:.2f}; "
            f"coded {coded.bytes / 1e9:.2f} GB, held {held / 1e9:.2f} GB",
            flush=True,
        )
        row = {"model": shape.name, "entropy": entropy, "bits": coded.bits, "coded_bytes": coded.bytes}
        results.append({**row, "bfloat16": baseline, "ours": ours})
    return results


def run_transformers(shape: Shape, entropies: list[float], eager: bool, unchecked: bool) -> list[dict[str, Any]]:
    """`generate` and prompts in transformers."""
    results = []
    baseline = measure(shape.kind, None, eager, unchecked, shape.sizes())
    print(f"{shape.name} in transformers, bfloat16: {_summary(baseline)}", flush=True)
    for entropy in entropies:
        coded = Coded(entropy)
        ours = measure(shape.kind, coded, eager, unchecked, shape.sizes())
        ratio = ours["static"]["tokens_per_s"] / baseline["static"]["tokens_per_s"]
        slower = ours["prefill"]["median_ms"] / baseline["prefill"]["median_ms"]
        print(
            f"  {coded.bits:.3f} bits: {_summary(ours)}; x bfloat16 {ratio:.2f}, prompt takes {slower:.2f} of it",
            flush=True,
        )
        row = {"model": shape.name, "layers": shape.layers, "entropy": entropy}
        row |= {"bits": coded.bits, "coded_bytes": coded.bytes}
        results.append({**row, "bfloat16": baseline, "ours": ours})
    return results


def _summary(found: dict[str, Any]) -> str:
    static = found["static"]
    others = "".join(f", {way} {found[way]['tokens_per_s']:.1f}" for way in ("eager", "unchecked") if way in found)
    return (
        f"{static['tokens_per_s']:.1f} tokens/s ({static['min']:.1f} - {static['max']:.1f}), "
        f"whole calls {static['whole_call_tokens_per_s']:.1f}{others}; first call {static['first_call_s']:.1f} s, "
        f"{static['graphs']} graphs, {static['graph_breaks']} breaks, {static['cudagraph_skips']} skips; "
        f"prompt {found['prefill']['median_ms']:.1f} ms; held {found['held_bytes'] / 1e9:.2f} GB"
    )


def main() -> None:
    """Print a table and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--models", default=",".join(shape.name for shape in SHAPES))
    parser.add_argument("--parts", default="loop,transformers")
    parser.add_argument("--entropies", type=_numbers, default=list(ENTROPIES), help="of the loop's weights")
    parser.add_argument("--hf-entropies", type=_numbers, default=[2.2], help="of the weights in transformers")
    parser.add_argument("--eager", action="store_true", help="time transformers without compilation, too")
    parser.add_argument("--unchecked", action="store_true", help="time it with entrollm.hf.compile_config(), too")
    parser.add_argument("--layers", type=int, help="fewer, for a quick look")
    arguments = parser.parse_args()
    shapes = [shape for shape in SHAPES if shape.name in arguments.models.split(",")]
    if arguments.layers:
        shapes = [replace(shape, layers=arguments.layers) for shape in shapes]
    parts = arguments.parts.split(",")
    document: dict[str, Any] = {
        "device": torch.cuda.get_device_name(DEVICE),
        "commit": commit(),
        "torch": torch.__version__,
    }
    document["results"] = [row for shape in shapes if "loop" in parts for row in run_loop(shape, arguments.entropies)]
    document["transformers"] = [
        row
        for shape in shapes
        if "transformers" in parts
        for row in run_transformers(shape, arguments.hf_entropies, arguments.eager, arguments.unchecked)
    ]
    if arguments.json:
        arguments.json.write_text(json.dumps(document, indent=1) + "\n")


def _numbers(text: str) -> list[float]:
    return [float(number) for number in text.split(",")]


if __name__ == "__main__":
    main()
