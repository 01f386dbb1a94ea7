"""Time products of coded and flat matrices with 1 to 32 vectors, beside cuBLAS and 4-bit integers, in one run.

python benchmarks/cuda/batches.py --json results.json
"""

from __future__ import annotations

import argparse
import json
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from entrollm.torch.cuda.device_matrix import transcode
from entrollm.torch.cuda.flat import pack_flat
from entrollm.torch.cuda.flat_matrix import FlatCudaMatrix
from entrollm.torch.cuda.matrix import CudaMatrix
from gemv import (
    DEVICE,
    LAUNCHES,
    SHAPES,
    SOURCES,
    batch_times,
    commit,
    graph_times,
    measure_uncoded,
    random_symbols,
)

BATCHES = (1, 2, 4, 8, 16, 32)
DISTINCT_BYTES = 300 << 20


def bf16_times(rows: int, columns: int) -> dict[int, float]:
    """cuBLAS through torch, microseconds by batch."""
    copies = max(2, 3 * DISTINCT_BYTES // (2 * rows * columns))
    weights = [torch.randn(rows, columns, device=DEVICE).bfloat16() for _ in range(copies)]
    found = {}
    for batch in BATCHES:
        x = torch.randn(batch, columns, device=DEVICE).bfloat16()
        y = torch.empty(batch, rows, device=DEVICE).bfloat16()
        times = graph_times(
            lambda i, x=x, y=y: torch.matmul(x, weights[i % copies].T, out=y),  # type: ignore[misc]
            max(copies, LAUNCHES),
        )
        found[batch] = statistics.median(times)
    return found


def our_times(matrices: list[Any], weights: Tensor) -> dict[str, Any]:
    """Microseconds by batch, checked against float64, and of decoding to memory."""
    spread, error = batch_times(matrices, weights, BATCHES)
    decode = graph_times(lambda i: matrices[i].dequantize(torch.bfloat16), min(len(matrices), 8))
    bits = matrices[0].size_bytes * 8 / weights.numel()
    return {"bits": bits, "us": spread, "decode_us": statistics.median(decode), "error": error}


def measure(rows: int, columns: int, entropy: float) -> dict[str, Any]:
    """Both forms of a matrix of Gaussian symbols."""
    symbols, scale = random_symbols(rows, columns, entropy)
    weights = (symbols.double() - 128) * scale[:, None].double()
    coded = transcode("weights", symbols, scale, scale * -128)
    copies = max(4, DISTINCT_BYTES // coded.size_bytes)
    coded_copies = [
        CudaMatrix([replace(coded, chunks=replace(coded.chunks, data=coded.chunks.data.clone()))], DEVICE)
        for _ in range(copies)
    ]
    found = {"coded": our_times(coded_copies, weights)}
    del coded_copies
    flat = pack_flat("weights", symbols, scale, scale * -128)
    copies = max(4, DISTINCT_BYTES // flat.size_bytes)
    found["flat"] = our_times(
        [FlatCudaMatrix([replace(flat, data=flat.data.clone())], DEVICE) for _ in range(copies)], weights
    )
    return found


def main() -> None:
    """Print a table and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    results = []
    for rows, columns in SHAPES:
        bf16 = bf16_times(rows, columns)
        int4 = measure_uncoded(4, rows, columns, DISTINCT_BYTES)["median_us"]
        print(f"{rows} x {columns}: int4 {int4:.2f} us; bf16", {k: round(v, 1) for k, v in bf16.items()}, flush=True)
        for entropy in SOURCES:
            ours = measure(rows, columns, entropy)
            for form, of in ours.items():
                one = of["us"][1][0]
                times = ", ".join(f"{of['us'][batch][0]:.1f}" for batch in BATCHES)
                print(
                    f"  H {entropy} {form} {of['bits']:.2f} bits: {times} us; x bf16 {bf16[1] / one:.2f}, "
                    f"x int4 {int4 / one:.2f}; to memory {of['decode_us']:.1f} us; error {of['error']:.1e}",
                    flush=True,
                )
            row = {"rows": rows, "columns": columns, "entropy": entropy}
            results.append({**row, "bf16_us": bf16, "int4_us": int4, **ours})
    if arguments.json:
        document = {"device": torch.cuda.get_device_name(DEVICE), "commit": commit(), "results": results}
        arguments.json.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
