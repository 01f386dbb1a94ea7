"""Time a layer of experts: in one launch for each weight, expert by expert, and as transformers does in bfloat16.

    python benchmarks/cuda/experts.py --json results.json

Every layer has choices of its own among experts in memory of their own, so that the second-level cache holds few of
them. "One by one" knows the choices when the graph is made; without a graph it would also wait for the GPU to tell.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import PretrainedConfig
from transformers.integrations import moe

from entrollm.torch.cuda.coded_experts import CodedExperts
from entrollm.torch.cuda.device_matrix import transcode
from entrollm.torch.cuda.flat import pack_flat
from entrollm.torch.cuda.flat_experts import FlatExperts
from entrollm.torch.cuda.flat_matrix import FlatCudaMatrix
from entrollm.torch.cuda.matrix import CudaMatrix
from gemv import DEVICE, commit, graph_times, random_symbols

LAYERS = 12  # of a graph, each with other choices
TOKENS = (1, 4, 8)


@dataclass(frozen=True)
class Layer:
    """The sizes of a model's layer of experts."""

    name: str
    hidden: int
    inner: int
    experts: int
    choices: int


SHAPES = (
    Layer("Qwen3-30B-A3B", 2048, 768, 128, 8),
    Layer("Mixtral-8x7B", 4096, 14336, 8, 2),
    Layer("GPT-OSS-20B", 2880, 2880, 32, 4),
)


def copies(rows: int, columns: int, entropy: float, is_flat: bool, count: int) -> list[Any]:
    """Matrices with the same symbols in memory of their own."""
    symbols, scale = random_symbols(rows, columns, entropy)
    if is_flat:
        flat = pack_flat("weights", symbols, scale, scale * -128)
        return [replace(flat, data=flat.data.clone()) for _ in range(count)]
    coded = transcode("weights", symbols, scale, scale * -128)
    return [replace(coded, chunks=replace(coded.chunks, data=coded.chunks.data.clone())) for _ in range(count)]


def routes(layer: Layer, tokens: int) -> list[Tensor]:
    """The choices of every layer: int64 (tokens, choices), different ones for a token."""
    generator = torch.Generator(DEVICE).manual_seed(0)
    shape = tokens, layer.experts
    drawn = [torch.rand(shape, generator=generator, device=DEVICE).argsort(-1) for _ in range(LAYERS)]
    return [each[:, : layer.choices].contiguous() for each in drawn]


class Ours:
    """The layer with coded or flat matrices."""

    def __init__(self, layer: Layer, entropy: float, is_flat: bool) -> None:
        shapes = ((layer.inner, layer.hidden), (layer.inner, layer.hidden), (layer.hidden, layer.inner))
        gates, ups, downs = (copies(*shape, entropy, is_flat, layer.experts) for shape in shapes)
        together: Any = FlatExperts if is_flat else CodedExperts
        alone: Any = FlatCudaMatrix if is_flat else CudaMatrix
        self._first = together([list(pair) for pair in zip(gates, ups, strict=True)], DEVICE)
        self._second = together([[down] for down in downs], DEVICE)
        self._alone = [
            (alone(pair, DEVICE), alone([down], DEVICE)) for *pair, down in zip(gates, ups, downs, strict=True)
        ]
        parts = [*gates, *ups, *downs]
        self.bits = sum(part.size_bytes for part in parts) * 8 / sum(part.rows * part.columns for part in parts)

    def together(self, x: Tensor, chosen: Tensor) -> Tensor:
        """Two launches, of experts that are known on the GPU alone."""
        gate, up = self._first.multiply(x, chosen).chunk(2, -1)
        state = self._second.multiply(functional.silu(gate) * up, chosen)
        return state.reshape(*chosen.shape, -1).sum(1)

    def one_by_one(self, x: Tensor, chosen: list[list[int]]) -> Tensor:
        """Two launches for each expert, with choices that are known before."""
        y = torch.zeros_like(x)
        for expert in sorted(set(itertools.chain(*chosen))):
            tokens = [token for token, experts in enumerate(chosen) if expert in experts]
            whole = len(tokens) == len(x)
            first, second = self._alone[expert]
            gate, up = first.multiply(x if whole else _rows(x, tokens)).chunk(2, -1)
            state = second.multiply(functional.silu(gate) * up)
            if whole:
                y += state
            else:
                for row, token in enumerate(tokens):
                    y[token] += state[row]
        return y


def _rows(x: Tensor, rows: list[int]) -> Tensor:
    return torch.cat([x[row : row + 1] for row in rows])


def uncoded(layer: Layer) -> Any:
    """The layer in bfloat16, as transformers' implementations take it."""

    @moe.use_experts_implementation
    class Experts(torch.nn.Module):
        def __init__(self, config: PretrainedConfig) -> None:
            super().__init__()
            self.num_experts = layer.experts
            shape = layer.experts, 2 * layer.inner, layer.hidden
            self.gate_up_proj = torch.nn.Parameter(torch.randn(shape, device=DEVICE, dtype=torch.bfloat16) / 64)
            shape = layer.experts, layer.hidden, layer.inner
            self.down_proj = torch.nn.Parameter(torch.randn(shape, device=DEVICE, dtype=torch.bfloat16) / 64)
            self.act_fn = functional.silu

    return Experts(PretrainedConfig())


def timed(run: Callable[[int], object]) -> list[float]:
    """Median, least and most microseconds of a layer."""
    times = graph_times(run, LAYERS)
    return [statistics.median(times), min(times), max(times)]


def our_times(layer: Layer, entropy: float, is_flat: bool) -> dict[str, Any]:
    """Both ways of ours, by the number of tokens."""
    ours = Ours(layer, entropy, is_flat)
    found: dict[str, Any] = {"layer": layer.name, "entropy": entropy, "bits": ours.bits, "is_flat": is_flat}
    for tokens in TOKENS:
        x, chosen = torch.randn(tokens, layer.hidden, device=DEVICE).bfloat16(), routes(layer, tokens)
        known = [each.tolist() for each in chosen]
        one, other = ours.together(x, chosen[0]).double(), ours.one_by_one(x, known[0]).double()
        assert (one - other).norm() < 2e-2 * other.norm(), "both ways must give the same"
        found[f"{tokens} tokens"] = {
            "together": timed(lambda i, x=x, chosen=chosen: ours.together(x, chosen[i])),  # type: ignore[misc]
            "one by one": timed(lambda i, x=x, known=known: ours.one_by_one(x, known[i])),  # type: ignore[misc]
        }
    return found


def uncoded_times(layer: Layer) -> dict[int, dict[str, list[float]]]:
    """transformers' ways in bfloat16, by the number of tokens."""
    experts = uncoded(layer)
    ways = {"grouped_mm": moe.grouped_mm_experts_forward, "batched_mm": moe.batched_mm_experts_forward}
    found: dict[int, dict[str, list[float]]] = {tokens: {} for tokens in TOKENS}
    with torch.no_grad():
        for tokens, (name, forward) in itertools.product(TOKENS, ways.items()):
            x, chosen = torch.randn(tokens, layer.hidden, device=DEVICE).bfloat16(), routes(layer, tokens)
            weights = torch.ones_like(chosen[0], dtype=torch.bfloat16)
            found[tokens][name] = timed(
                lambda i, x=x, c=chosen, w=weights, f=forward: f(experts, x, c[i], w)  # type: ignore[misc]
            )
    return found


def main() -> None:
    """Print a table and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--entropies", type=lambda text: [float(part) for part in text.split(",")], default=[2.2, 3.2])
    arguments = parser.parse_args()
    results = []
    for layer in SHAPES:
        bf16 = uncoded_times(layer)
        torch.cuda.empty_cache()
        for entropy, is_flat in itertools.product(arguments.entropies, (True, False)):
            results.append(our_times(layer, entropy, is_flat))
            torch.cuda.empty_cache()
            print(f"{layer.name}, {'flat' if is_flat else 'coded'}, {results[-1]['bits']:.2f} bits", flush=True)
            for tokens in TOKENS:
                ways = results[-1][f"{tokens} tokens"]
                ways |= bf16[tokens]
                times = ", ".join(f"{way} {us[0]:.1f} ({us[1]:.1f} - {us[2]:.1f})" for way, us in ways.items())
                best = min(us[0] for us in bf16[tokens].values())
                print(f"  {tokens} tokens: {times} us; x bfloat16 {best / ways['together'][0]:.2f}", flush=True)
    if arguments.json:
        document = {"device": torch.cuda.get_device_name(DEVICE), "commit": commit(), "results": results}
        arguments.json.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
