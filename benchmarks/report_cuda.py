"""The section of docs/benchmarks.md on GPUs, from the JSON files of benchmarks/cuda/results."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "cuda" / "results"
# Goals over cuBLAS in bfloat16 and over int8, by the entropy of the source; the square shape has its own.
GOALS = {1.47: (4.0, 1.7), 2.2: (3.3, 1.4), 3.2: (3.1, 1.35), 5.6: (2.5, 1.1)}
SQUARE_GOALS = {2.2: (2.5, 1.0)}


def gpu_section() -> str:
    """The tables, or nothing without results."""
    if not (RESULTS / "gemv.json").exists():
        return ""
    gemv = json.loads((RESULTS / "gemv.json").read_text())
    generate = json.loads((RESULTS / "generate.json").read_text())
    return f"""## GPU: {gemv["device"]}

`python benchmarks/cuda/gemv.py --json FILE` and `python benchmarks/cuda/generate.py --json FILE`; medians of 15 replays
of a CUDA graph over at least 600 MB of distinct weights, one vector, all in one run. Random integers of the stated
entropy; bits include everything that stays in GPU memory. The int8 baseline is hand-written (benchmarks/cuda/int8.cu),
overlaps launches as ours does, and rounds its activations to 8 bits in the kernel, ours to 16. Goals in brackets.

| rows x columns | entropy | GPU bits | us | spread | x bf16 | x int8 | to bf16 in memory, us |
|---|---|---|---|---|---|---|---|
{_gemv_rows(gemv)}

cuBLAS bf16 and int8 took {_baselines(gemv)}.

A token of a Llama-shaped model at batch 1, the same loop in a CUDA graph (goal: 2 x bfloat16 at 2.4 bits):

| model | GPU bits | tokens/s | spread | bfloat16 tokens/s | ratio |
|---|---|---|---|---|---|
{_generate_rows(generate)}

[cuda.md](cuda.md) says what bounds these."""


def _gemv_rows(result: dict[str, Any]) -> str:
    lines = []
    for row in result["results"]:
        ours = row["ours"]
        over = [row[name]["median_us"] / ours["median_us"] for name in ("bf16", "int8")]
        goals = (SQUARE_GOALS if row["rows"] == row["columns"] else GOALS).get(row["entropy"])
        marks = [f" [{goal:g}]" for goal in goals] if goals else ["", ""]
        lines.append(
            f"| {row['rows']} x {row['columns']} | {row['entropy']} | {ours['bits']:.2f} | {ours['median_us']:.1f} "
            f"| {ours['min_us']:.1f}-{ours['max_us']:.1f} | {over[0]:.2f}{marks[0]} | {over[1]:.2f}{marks[1]} "
            f"| {ours['decode_us']:.0f} |"
        )
    return "\n".join(lines)


def _baselines(result: dict[str, Any]) -> str:
    found = {(row["rows"], row["columns"]): row for row in result["results"]}
    return "; ".join(
        f"{row['bf16']['median_us']:.1f} and {row['int8']['median_us']:.1f} us for {rows} x {columns}"
        for (rows, columns), row in found.items()
    )


def _generate_rows(result: dict[str, Any]) -> str:
    return "\n".join(
        f"| {row['model']} | {row['bits']:.2f} | {row['ours']['tokens_per_s']:.0f} "
        f"| {row['ours']['min']:.0f}-{row['ours']['max']:.0f} | {row['bfloat16']['tokens_per_s']:.0f} "
        f"| {row['ours']['tokens_per_s'] / row['bfloat16']['tokens_per_s']:.2f} |"
        for row in result["results"]
    )
