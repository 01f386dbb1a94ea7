"""Time products with group scales against cuBLAS bfloat16 and int4, over distinct weights, and decoding to memory.

python benchmarks/cuda/grouped.py --json results.json
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
from pathlib import Path
from typing import Any

import numpy as np
import torch

from entrollm.format.group_scales import GroupedKind, GroupScales
from entrollm.torch.cuda.grouped import GroupedCudaMatrix, GroupedFields
from gemv import DEVICE, DISTINCT_BYTES, SHAPES, batch_times, commit, graph_times, measure_bf16, measure_uncoded

_K = {"group_scale": "U8", "super_scale": "F16", "group_minimum": "U8", "super_minimum": "F16"}
FORMS = {
    "GPTQ, groups of 128": (4, GroupedKind(128, {"group_scale": "F16", "group_zero": "U8"}, arithmetic="F16")),
    "compressed-tensors, groups of 32": (
        4,
        GroupedKind(32, {"group_scale": "BF16"}, arithmetic="BF16", zero=8),
    ),
    "HQQ, groups of 64": (4, GroupedKind(64, {"group_scale": "F16", "group_zero": "F16"}, arithmetic="F16")),
    "Q4_K": (4, GroupedKind(32, _K, super_size=256)),
    "Q6_K": (6, GroupedKind(16, {"group_scale": "I8", "super_scale": "F16"}, super_size=256, zero=32)),
    "E4M3, blocks of 128": (8, GroupedKind(128, {"group_scale": "F32"}, values="F8_E4M3")),
}
BATCHES = (1, 2, 4, 8)
_TYPES = {"F32": np.float32, "F16": np.float16, "BF16": np.float32, "U8": np.uint8, "I8": np.int8}


def random_fields(bits: int, kind: GroupedKind, rows: int, columns: int) -> GroupedFields:
    """Random symbols and scales of a form."""
    symbols = torch.randint(0, 1 << bits, (rows, columns), device=DEVICE, dtype=torch.uint8)
    if kind.values is not None:
        symbols &= 0xBF  # no NaN
    rng = np.random.default_rng(0)
    arrays: dict[str, Any] = {}
    for name, count in kind.lengths(rows, columns).items():
        stored = kind.types[name]
        if stored in ("U8", "I8"):
            values = rng.integers(1, 16, count).astype(_TYPES[stored])
        else:
            values = rng.uniform(0.001, 0.01, count).astype(_TYPES[stored])
        if stored == "BF16":
            values = (values.view(np.uint32) >> 16).astype(np.uint16)
        arrays[name] = values.reshape(rows, -1)
    return GroupedFields.of("weights", symbols, GroupScales(kind, arrays))


def measure(bits: int, kind: GroupedKind, rows: int, columns: int) -> dict[str, Any]:
    """Products with each batch, checked against the decoded matrix, and decoding to memory."""
    first = random_fields(bits, kind, rows, columns)
    single = GroupedCudaMatrix.from_fields(first, DEVICE)
    weights = single.dequantize(torch.float32).double()
    found: dict[str, Any] = {"bits": first.size_bytes * 8 / (rows * columns)}
    copies = max(4, DISTINCT_BYTES // first.size_bytes)
    parts = [
        dataclasses.replace(first, fields={width: part.clone() for width, part in first.fields.items()})
        for _ in range(copies)
    ]
    matrices = [GroupedCudaMatrix.from_fields(part, DEVICE) for part in parts]
    found["us"], found["error"] = batch_times(matrices, weights, BATCHES)
    decode = graph_times(lambda i: matrices[i % copies].dequantize(torch.bfloat16), 5)
    found["decode_us"] = statistics.median(decode)
    return found


def main() -> None:
    """Print a table and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    results = []
    for rows, columns in SHAPES:
        bf16, int4 = measure_bf16(rows, columns), measure_uncoded(4, rows, columns)
        print(f"{rows} x {columns}: bf16 {bf16['median_us']:.2f} us, int4 {int4['median_us']:.2f} us", flush=True)
        for name, (bits, kind) in FORMS.items():
            ours = measure(bits, kind, rows, columns)
            times = ", ".join(f"{ours['us'][batch][0]:.1f}" for batch in BATCHES)
            us = ours["us"][1][0]
            ratios = f"x bf16 {bf16['median_us'] / us:.2f}, x int4 {int4['median_us'] / us:.2f}"
            print(f"  {name}: {ours['bits']:.2f} bits, batches {BATCHES}: {times} us; {ratios}", flush=True)
            print(f"    to memory {ours['decode_us']:.1f} us", flush=True)
            results.append({"rows": rows, "columns": columns, "form": name, "bf16": bf16, "int4": int4, "ours": ours})
    if arguments.json:
        document = {"device": torch.cuda.get_device_name(DEVICE), "commit": commit(), "results": results}
        arguments.json.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
