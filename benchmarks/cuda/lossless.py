"""Time products of lossless bfloat16 matrices with 1 to 8 vectors, beside cuBLAS over the same weights, in one run.

python benchmarks/cuda/lossless.py --json results.json
"""

from __future__ import annotations

import argparse
import json
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from entrollm.torch.cuda.lossless import pack_lossless
from entrollm.torch.cuda.lossless_matrix import LosslessCudaMatrix
from gemv import DEVICE, DISTINCT_BYTES, LAUNCHES, commit, graph_times, summary

BATCHES = (1, 2, 4, 8)
SHAPES = ((14336, 4096), (4096, 14336), (28672, 4096), (6144, 4096), (4096, 4096), (128256, 4096))


def measure(rows: int, columns: int) -> dict[str, Any]:
    """Both products with each batch, ours checked against float64, and decoding to memory."""
    weights = (torch.randn(rows, columns, device=DEVICE) * columns**-0.5).bfloat16()
    part = pack_lossless("weights", weights)
    copies = max(2, DISTINCT_BYTES // part.size_bytes)
    dense = [weights.clone() for _ in range(copies)]
    matrices = [LosslessCudaMatrix([replace(part, data=part.data.clone())], DEVICE) for _ in range(copies)]
    assert torch.equal(matrices[0].dequantize(torch.bfloat16).view(torch.int16), weights.view(torch.int16))
    found: dict[str, Any] = {"rows": rows, "columns": columns, "bits": part.size_bytes * 8 / (rows * columns)}
    launches = max(copies, LAUNCHES)
    for batch in BATCHES:
        x = torch.randn(batch, columns, device=DEVICE)
        some = weights[:4096].double()
        expected = x.double() @ some.T
        error = float((matrices[0].multiply(x)[:, :4096].double() - expected).norm() / expected.norm())
        assert error < 1e-5, (batch, error)
        x = x.bfloat16()
        y = torch.empty(batch, rows, device=DEVICE).bfloat16()
        products = [matrix.product(batch, x.dtype) for matrix in matrices]
        bf16 = graph_times(lambda i, x=x, y=y: torch.matmul(x, dense[i % copies].T, out=y), launches)
        ours = graph_times(lambda i, x=x, y=y, products=products: products[i % copies](x, y), launches)
        expected = x.double() @ some.T
        error_bf16 = float((y[:, :4096].double() - expected).norm() / expected.norm())
        assert error_bf16 < 4e-3, (batch, error_bf16)
        found[f"batch {batch}"] = {"ours": summary(ours), "bf16": summary(bf16), "error": error}
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
        found = measure(rows, columns)
        print(f"{rows} x {columns}, {found['bits']:.2f} bits; to memory {found['decode_us']:.1f} us", flush=True)
        for batch in BATCHES:
            ours, bf16, error = found[f"batch {batch}"].values()
            print(
                f"  batch {batch}: {ours['median_us']:.2f} us ({ours['min_us']:.2f} - {ours['max_us']:.2f}), bf16 "
                f"{bf16['median_us']:.2f} ({bf16['min_us']:.2f} - {bf16['max_us']:.2f}), "
                f"ratio {bf16['median_us'] / ours['median_us']:.3f}; float32 error {error:.1e}",
                flush=True,
            )
        results.append(found)
    if arguments.json:
        document = {"device": torch.cuda.get_device_name(DEVICE), "commit": commit(), "results": results}
        arguments.json.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
