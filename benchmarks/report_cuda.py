"""The section of docs/research/benchmarks.md on GPUs, from the JSON files of benchmarks/cuda/results."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "cuda" / "results"
# Goals over cuBLAS in bfloat16 and over int8, by the entropy of the source; the square shape has its own.
GOALS = {1.47: (4.0, 1.7), 2.2: (3.3, 1.4), 3.2: (3.1, 1.35), 5.6: (2.5, 1.1)}
SQUARE_GOALS = {2.2: (2.5, 1.0)}
BASELINES = ("bf16", "int8", "int4")


def gpu_section() -> str:
    """The tables, or nothing without results."""
    if not (RESULTS / "gemv.json").exists():
        return ""
    gemv = json.loads((RESULTS / "gemv.json").read_text())
    generate = json.loads((RESULTS / "generate.json").read_text())
    return f"""## GPU: {gemv["device"]}

### Products

`python benchmarks/cuda/gemv.py --json FILE`: medians of 15 replays of a CUDA graph over at least 600 MB of distinct
weights, one vector, all in one run (commit {gemv["commit"]}). The integers are random, of the stated entropy. Bits
include everything that stays in GPU memory. The int8 and int4 products are hand-written (`benchmarks/cuda/uncoded.cu`);
int4 has a scale for every 128 columns. Both overlap launches as ours does. They round activations to 8 bits in the
kernel, ours rounds to 16. Goals are in brackets.

| rows x columns | entropy | GPU bits | µs | spread | x bf16 | x int8 | x int4 |
|---|---|---|---|---|---|---|---|
{_gemv_rows(gemv)}

cuBLAS bf16, int8 and int4 took {_baselines(gemv)}.
{_generation(generate)}{_memory()}{_peers()}
[GPU kernels](cuda.md#what-bounds-it) says what bounds these."""


def _gemv_rows(result: dict[str, Any]) -> str:
    lines = []
    for row in result["results"]:
        ours = row["ours"]
        over = [row[name]["median_us"] / ours["median_us"] for name in BASELINES]
        goals = (SQUARE_GOALS if row["rows"] == row["columns"] else GOALS).get(row["entropy"], ())
        marks = [f" [{goal:g}]" for goal in goals] + [""] * (len(BASELINES) - len(goals))
        lines.append(
            f"| {row['rows']} x {row['columns']} | {row['entropy']} | {ours['bits']:.2f} | {ours['median_us']:.1f} "
            f"| {ours['min_us']:.1f}-{ours['max_us']:.1f} | "
            + " | ".join(f"{ratio:.2f}{mark}" for ratio, mark in zip(over, marks, strict=True))
            + " |"
        )
    return "\n".join(lines)


def _baselines(result: dict[str, Any]) -> str:
    found = {(row["rows"], row["columns"]): row for row in result["results"]}
    return "; ".join(
        ", ".join(f"{row[name]['median_us']:.1f}" for name in BASELINES) + f" µs for {rows} x {columns}"
        for (rows, columns), row in found.items()
    )


def _generation(result: dict[str, Any]) -> str:
    """Generation in transformers."""
    lines = []
    for row in result["results"]:
        ours, dense = row["ours"], row["bfloat16"]
        rates = [found[way]["tokens_per_s"] for way in ("static", "fast") for found in (ours, dense)]
        prompt_ms, dense_ms = ours["prefill"]["median_ms"], dense["prefill"]["median_ms"]
        lines.append(
            f"| {row['model']}, {row['layers']} layers | {row['bits']:.2f} | {rates[0]:.0f} | {rates[1]:.0f} "
            f"| {rates[0] / rates[1]:.2f} | {rates[2]:.0f} ({ours['fast']['min']:.0f}-{ours['fast']['max']:.0f}) "
            f"| {rates[3]:.0f} | {rates[2] / rates[1]:.2f} | {rates[2] / rates[3]:.2f} "
            f"| {prompt_ms:.0f} ms | {prompt_ms / dense_ms:.2f} "
            f"| {ours['held_bytes'] / 1e9:.2f} of {dense['held_bytes'] / 1e9:.2f} GB |"
        )
    return f"""
### Generation in transformers

`python benchmarks/cuda/generate.py --json FILE`: tokens per second of Llama-shaped models in transformers at batch 1,
by the median time between tokens after a prompt of 128 (commit {result["commit"]}). "static" is transformers'
`generate` with `cache_implementation="static"`, which runs a token as a CUDA graph. "fast" is `entrollm.hf.generate`,
which also accepts uncoded models. The prompt has 2,048 tokens and is not compiled. Goals at 2.4 bits: twice the rate of
transformers with bfloat16 and CUDA graphs ("fast over static bf16"), and 1.15 times the time of a prompt. The GPU
memory is that of the weights, the embedding in bfloat16 included.

| model | GPU bits | static | static bf16 | ratio | fast | fast bf16 | fast over static bf16 | fast over fast bf16 \
| prompt | x bf16 | GPU memory |
|---|---|---|---|---|---|---|---|---|---|---|---|
{chr(10).join(lines)}
"""


def _memory() -> str:
    """Loading, where it was measured."""
    path = RESULTS / "load.json"
    if not path.exists():
        return ""
    lines = []
    rows = json.loads(path.read_text())
    for row in rows:
        file_bytes, held, peak = row["file_bytes"], row["load"]["held_bytes"], row["load"]["peak_bytes"]
        lines.append(
            f"| {row['layers']} | {row['weights'] / 1e9:.2f} | {file_bytes / 1e9:.2f} GB, {row['file_bits']:.2f} bits "
            f"| {held / 1e9:.2f} GB, {100 * (held / file_bytes - 1):.0f} % | {(peak - held) / 1e9:.2f} GB "
            f"| {row['load']['seconds']:.0f} s, {row['weights'] / row['load']['seconds'] / 1e6:.0f} Mweights/s |"
        )
    return f"""
### Loading

`python benchmarks/cuda/load.py`: GPU memory after loading a random model of Llama-2-7B's shape with transformers, and
how much more is in use at most while it loads, of which the integers of the largest matrix are 0.13 GB. Goals: 5 % over
the file, and at most one layer more while it loads, which is 0.40 GB in bfloat16. Commit
{", ".join(row["commit"] for row in rows)}.

| layers | 10^9 weights | file | GPU memory, over the file | more while loading | loading |
|---|---|---|---|---|---|
{chr(10).join(lines)}
"""


def _peers() -> str:
    """Other ways to multiply, where they were measured."""
    path = RESULTS / "peers.json"
    if not path.exists():
        return ""
    result = json.loads(path.read_text())
    lines = [
        f"| {row['rows']} x {row['columns']} | {_peer_name(name)} | {found.get('bits', 16):.2f} "
        f"| {_of(found, 'decode')} | {_product_us(name, found)} |"
        for row in result["results"]
        for name, found in row.items()
        if isinstance(found, dict)
    ]
    missing = "".join(f" Left out: {reason}." for reason in result["missing"].values())
    return f"""
### Other ways to multiply

`python benchmarks/cuda/peers.py --json FILE`: one vector, in one run (commit {result["commit"]}). Peers that decode to
memory are followed by cuBLAS. nvCOMP's ANS ran in a process of its own a few seconds later; it decodes one byte per
weight, and a product would come on top.{missing}

| rows x columns | | bits | decoding to memory | product |
|---|---|---|---|---|
{chr(10).join(lines)}
"""


def _peer_name(name: str) -> str:
    kind, _, entropy = name.partition(" ")
    names = {
        "bf16": "cuBLAS bf16",
        "int4": "int4 weight-only, torch's, groups of 128",
        "dfloat11": "DFloat11's kernel, bf16 weights",
        "nvcomp": "nvCOMP ANS",
        "ours": "ours",
    }
    return names[kind] + (f", entropy {entropy}" if entropy else "")


def _of(found: dict[str, Any], key: str) -> str:
    apart = found.get("to_memory", found)
    if "decoded_gb_per_s" not in apart:
        return "-"
    return f"{apart.get(key, apart)['median_us']:.0f} µs, {apart['decoded_gb_per_s']:.0f} GB/s"


def _product_us(name: str, found: dict[str, Any]) -> str:
    if name.startswith("nvcomp"):
        return "-"
    text = f"{found['median_us']:.1f} µs"
    return text + (f"; through memory {found['to_memory']['median_us']:.1f} µs" if "to_memory" in found else "")
