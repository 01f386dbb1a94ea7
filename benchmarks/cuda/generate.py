"""Tokens per second at batch 1 of Llama-shaped models in transformers, coded against bfloat16.

    python benchmarks/cuda/generate.py --json results.json
    python benchmarks/cuda/generate.py --models Mistral-7B --entropies 1.47,2.2 --eager

Both generate with `generate` and a static cache, for which transformers compiles the step with CUDA graphs, and with
`entrollm.hf.generate`; the time of a prompt of 2,048 tokens comes with it. Weights are random integers of a stated
entropy, or with `--forms lossless` Gaussian bfloat16; matrices of one shape hold the same ones in memory of their own.
"""

from __future__ import annotations

import argparse
import itertools
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from hf_model import measure

from entrollm.torch.cuda.device_matrix import DeviceMatrix, transcode
from entrollm.torch.cuda.flat import FlatPart, pack_flat
from entrollm.torch.cuda.flat_matrix import FlatCudaMatrix
from entrollm.torch.cuda.lossless import LosslessPart, pack_lossless
from entrollm.torch.cuda.lossless_matrix import LosslessCudaMatrix
from entrollm.torch.cuda.matrix import CudaMatrix
from gemv import DEVICE, commit, gaussian_deviation


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


class Coded:
    """Makes matrices of a form: the first of a shape is written, the others are copies of it."""

    def __init__(self, entropy: float, form: str) -> None:
        self._deviation = gaussian_deviation(entropy)
        self._form = form
        self._made: dict[tuple[int, int], DeviceMatrix | FlatPart | LosslessPart] = {}
        self.bytes = self.weights = 0

    def _first(self, rows: int, columns: int) -> DeviceMatrix | FlatPart | LosslessPart:
        if self._form == "lossless":
            words = torch.empty(rows, columns, dtype=torch.bfloat16, device=DEVICE)
            return pack_lossless("weights", words.normal_(std=columns**-0.5))
        symbols = torch.empty(rows, columns, dtype=torch.uint8, device=DEVICE)
        for i in range(0, rows, 8192):
            part = torch.randn(min(8192, rows - i), columns, device=DEVICE).mul_(self._deviation).round_().add_(128)
            symbols[i : i + 8192] = part.clamp_(0, 255).to(torch.uint8)
        scale = torch.full((rows,), columns**-0.5 / self._deviation, device=DEVICE)
        make = pack_flat if self._form == "flat" else transcode
        return make("weights", symbols, scale, scale * -128)

    def __call__(self, rows: int, columns: int) -> CudaMatrix | FlatCudaMatrix | LosslessCudaMatrix:
        """A matrix of its own."""
        first = self._made.get((rows, columns))
        if first is None:
            first = self._made[rows, columns] = self._first(rows, columns)
        matrix: CudaMatrix | FlatCudaMatrix | LosslessCudaMatrix
        if isinstance(first, FlatPart):
            matrix = FlatCudaMatrix([replace(first, data=first.data.clone())], DEVICE)
        elif isinstance(first, LosslessPart):
            matrix = LosslessCudaMatrix([replace(first, data=first.data.clone())], DEVICE)
        else:
            chunks = replace(first.chunks, data=first.chunks.data.clone())
            matrix = CudaMatrix([replace(first, chunks=chunks)], DEVICE)
        self.bytes += matrix.size_bytes
        self.weights += rows * columns
        return matrix

    @property
    def bits(self) -> float:
        """Per weight, with everything that stays in GPU memory."""
        return self.bytes * 8 / self.weights


def run(shape: Shape, entropies: list[float], eager: bool, forms: list[str]) -> list[dict[str, Any]]:
    """Both ways to generate, and prompts."""
    results = []
    baseline = measure(shape.kind, None, eager, shape.sizes())
    print(f"{shape.name}, bfloat16: {_summary(baseline)}", flush=True)
    for entropy, form in itertools.product(entropies, forms):
        coded = Coded(entropy, form)
        ours = measure(shape.kind, coded, eager, shape.sizes())
        ratio, fast, same = (
            ours[way]["tokens_per_s"] / baseline[of]["tokens_per_s"]
            for way, of in (("static", "static"), ("fast", "static"), ("fast", "fast"))
        )
        slower = ours["prefill"]["median_ms"] / baseline["prefill"]["median_ms"]
        print(
            f"  {form}, {coded.bits:.3f} bits: {_summary(ours)}; x bfloat16 {ratio:.2f}, "
            f"fast {fast:.2f}, both fast {same:.2f}; prompt takes {slower:.2f} of it",
            flush=True,
        )
        row = {"model": shape.name, "layers": shape.layers, "entropy": entropy, "form": form}
        row |= {"bits": coded.bits, "coded_bytes": coded.bytes}
        results.append({**row, "bfloat16": baseline, "ours": ours})
    return results


def _summary(found: dict[str, Any]) -> str:
    static = found["static"]
    others = "".join(f", {way} {found[way]['tokens_per_s']:.1f}" for way in ("eager", "fast") if way in found)
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
    parser.add_argument("--entropies", type=_numbers, default=[2.2], help="of the weights")
    parser.add_argument("--eager", action="store_true", help="time transformers without compilation, too")
    parser.add_argument(
        "--forms", type=lambda text: text.split(","), default=["coded", "flat"], help="coded, flat, lossless"
    )
    parser.add_argument("--layers", type=int, help="fewer, for a quick look")
    arguments = parser.parse_args()
    shapes = [shape for shape in SHAPES if shape.name in arguments.models.split(",")]
    if arguments.layers:
        shapes = [replace(shape, layers=arguments.layers) for shape in shapes]
    document: dict[str, Any] = {
        "device": torch.cuda.get_device_name(DEVICE),
        "commit": commit(),
        "torch": torch.__version__,
    }
    document["results"] = [
        row for shape in shapes for row in run(shape, arguments.entropies, arguments.eager, arguments.forms)
    ]
    if arguments.json:
        arguments.json.write_text(json.dumps(document, indent=1) + "\n")


def _numbers(text: str) -> list[float]:
    return [float(number) for number in text.split(",")]


if __name__ == "__main__":
    main()
