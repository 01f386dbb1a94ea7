"""Time fused decode + product against cuBLAS bfloat16, int8 and int4 products, one vector, over distinct weights.

    python benchmarks/cuda/gemv.py --json results.json
    ncu --clock-control none -k regex:"multiply|decode" --section SpeedOfLight --section SchedulerStats \\
        --section WarpStateStats --section MemoryWorkloadAnalysis python benchmarks/cuda/gemv.py --once
"""

from __future__ import annotations

import argparse
import ctypes
import functools
import itertools
import json
import math
import statistics
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from entrollm.torch.cuda import compile as kernels
from entrollm.torch.cuda.device_matrix import DeviceMatrix, transcode
from entrollm.torch.cuda.flat import pack_flat
from entrollm.torch.cuda.flat_matrix import FlatCudaMatrix
from entrollm.torch.cuda.launch import Function
from entrollm.torch.cuda.matrix import CudaMatrix

SOURCES = (1.47, 2.2, 3.2, 5.6)
SHAPES = ((14336, 4096), (4096, 14336), (4096, 4096))
DEVICE = torch.device("cuda", 0)
# Of weights in every measurement, so that the second-level cache holds none of them.
DISTINCT_BYTES = 600 << 20
REPLAYS = 15
# Launches of a graph at least, so that starting it counts little.
LAUNCHES = 20
# Columns that share a scale of the int4 baseline.
GROUP = 128
# Divisions of work that baselines may take: warps a block, rows a warp, loads ahead, blocks a multiprocessor.
UNCODED = ((8, 2, 2, 2), (8, 2, 4, 2), (8, 1, 4, 2), (8, 2, 7, 1), (8, 4, 2, 1), (8, 2, 4, 1))


def commit() -> str:
    """The commit that is measured."""
    found = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return found.stdout.strip() or "unknown"


def gaussian_deviation(entropy: float) -> float:
    """The deviation of a Gaussian that has this entropy once rounded to integers."""
    low, high = 0.01, 100.0
    for _ in range(60):
        middle = math.sqrt(low * high)
        edges = [0.5 * (1 + math.erf((k + 0.5) / middle / math.sqrt(2))) for k in range(-300, 301)]
        shares = [b - a for a, b in itertools.pairwise(edges)]
        found = -sum(p * math.log2(p) for p in shares if p > 0)
        low, high = (middle, high) if found < entropy else (low, middle)
    return math.sqrt(low * high)


def graph_times(launch: Callable[[int], None], copies: int) -> list[float]:
    """Microseconds of each of `copies` launches, from replays of a graph of all of them."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for i in range(2):
            launch(i % copies)
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for i in range(copies):
            launch(i)
    times = []
    for _ in range(REPLAYS + 2):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        with torch.cuda.stream(stream):
            begin.record()
            graph.replay()
            end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) * 1000 / copies)
    return times[2:]


def batch_times(matrices: list[Any], weights: Tensor, batches: Sequence[int]) -> tuple[dict[int, list[float]], float]:
    """Median, least and most microseconds of products of bfloat16 by batch, over distinct matrices of equal weights.

    Args:
        matrices: in GPU memory of their own.
        weights: float64, what they hold.
        batches: numbers of vectors.
    Returns:
        the times, and the largest relative error against float64.
    """
    found, errors = {}, []
    copies = len(matrices)
    for batch in batches:
        x = torch.randn(batch, weights.shape[1], device=DEVICE).bfloat16()
        expected = x.double() @ weights.T
        errors.append(float((matrices[0].multiply(x).double() - expected).norm() / expected.norm()))
        assert errors[-1] < 4e-3, (batch, errors)  # that of outputs in bfloat16
        times = graph_times(lambda i, x=x: matrices[i % copies].multiply(x), max(copies, LAUNCHES))  # type: ignore[misc]
        found[batch] = [statistics.median(times), min(times), max(times)]
    return found, max(errors)


def summary(times: list[float]) -> dict[str, float]:
    """Median, least and largest microseconds."""
    return {"median_us": statistics.median(times), "min_us": min(times), "max_us": max(times)}


def measure_bf16(rows: int, columns: int, distinct_bytes: int = DISTINCT_BYTES * 3) -> dict[str, float]:
    """cuBLAS through torch."""
    copies = max(1, distinct_bytes // (2 * rows * columns))
    weights = [torch.randn(rows, columns, device=DEVICE).bfloat16() for _ in range(copies)]
    x = torch.randn(1, columns, device=DEVICE).bfloat16()
    y = torch.empty(1, rows, device=DEVICE).bfloat16()
    return summary(graph_times(lambda i: torch.matmul(x, weights[i % copies].T, out=y), max(copies, LAUNCHES)))


def measure_uncoded(bits: int, rows: int, columns: int, distinct_bytes: int = DISTINCT_BYTES * 2) -> dict[str, float]:
    """The hand-written int8 or int4 product, checked against float64, with the fastest of several divisions of work."""
    edge = 1 << bits - 1
    weights = torch.randint(-edge, edge, (rows, columns), device=DEVICE, dtype=torch.int8)
    first = _packed(weights) if bits == 4 else weights
    copies = [first.clone() for _ in range(max(1, distinct_bytes // first.numel()))]
    groups = columns // GROUP if bits == 4 else 1
    scale = (torch.rand(rows, groups, device=DEVICE) + 0.5).to(torch.bfloat16 if bits == 4 else torch.float32)
    x = torch.randn(columns, device=DEVICE).bfloat16()
    y = torch.empty(rows, device=DEVICE).bfloat16()
    expected = (weights.double() * scale.double().repeat_interleave(columns // groups, 1)) @ x.double()
    values = [ctypes.c_void_p(0), *(ctypes.c_void_p(tensor.data_ptr()) for tensor in (scale, x, y))]
    values += [ctypes.c_int(rows), ctypes.c_int(columns)]
    found = []
    for warps, warp_rows, ahead, blocks in UNCODED:
        if columns * bits // 4096 % ahead:
            continue
        macros = (("BITS", bits), ("WARPS", warps), ("ROWS", warp_rows), ("AHEAD", ahead))
        function = _uncoded(macros, columns)

        def launch(i: int, function: Function = function, warps: int = warps, blocks: int = blocks) -> None:
            values[0] = ctypes.c_void_p(copies[i % len(copies)].data_ptr())
            grid = torch.cuda.get_device_properties(DEVICE).multi_processor_count * blocks
            function.launch(values, grid, warps * 32, overlap=True)

        y.zero_()
        launch(0)
        error = float((y.double() - expected).norm() / expected.norm())
        assert error < 0.02, (macros, error)
        found.append(
            {
                **summary(graph_times(launch, max(len(copies), LAUNCHES))),
                "error": error,
                **dict(macros),
                "blocks": blocks,
            }
        )
    return min(found, key=lambda row: row["median_us"])


def _uncoded(macros: tuple[tuple[str, int], ...], columns: int) -> Function:
    from cuda.core import ObjectCode

    code = ObjectCode.from_cubin(_uncoded_cubin(macros))
    # The digits lie behind what CUDA reserves and the kernel's variables.
    return Function(code.get_kernel("multiply_uncoded"), DEVICE, columns + (2 << 10))


@functools.cache
def _uncoded_cubin(macros: tuple[tuple[str, int], ...]) -> bytes:
    source = (Path(__file__).parent / "uncoded.cu").read_text()
    return kernels.compile_source(source, kernels.Target(torch.cuda.get_device_capability(DEVICE)), macros)


def _packed(weights: Tensor) -> Tensor:
    """Two 4-bit weights a byte, with 8 added: of eight in a row, byte i holds the ones at i and i + 4."""
    eights = (weights + 8).to(torch.uint8).reshape(weights.shape[0], -1, 2, 4)
    return (eights[:, :, 0] | eights[:, :, 1] << 4).contiguous()


def launch_once(rows: int, columns: int, entropy: float) -> None:
    """One product and one decoding to memory, for a profiler."""
    matrix = CudaMatrix([random_matrix(rows, columns, entropy)[2]], DEVICE)
    matrix.multiply(torch.randn(1, columns, device=DEVICE).bfloat16())
    matrix.dequantize(torch.bfloat16)
    torch.cuda.synchronize()


def random_symbols(rows: int, columns: int, entropy: float) -> tuple[Tensor, Tensor]:
    """Gaussian symbols of an entropy about 128, and a scale for each row."""
    symbols = torch.randn(rows, columns, device=DEVICE).mul_(gaussian_deviation(entropy)).round_().add_(128)
    return symbols.clamp_(0, 255).to(torch.uint8), torch.rand(rows, device=DEVICE) + 0.5


def random_matrix(rows: int, columns: int, entropy: float) -> tuple[Tensor, Tensor, DeviceMatrix]:
    """Gaussian symbols of an entropy about 128, a scale for each row, and both in the layout."""
    symbols, scale = random_symbols(rows, columns, entropy)
    return symbols, scale, transcode("weights", symbols, scale, scale * -128)


def measure_coded(rows: int, columns: int, entropy: float) -> dict[str, float]:
    """Ours, checked against float64 and the symbols it was made from."""
    symbols, scale, matrix = random_matrix(rows, columns, entropy)
    single = CudaMatrix([matrix], DEVICE)
    x = torch.randn(1, columns, device=DEVICE)
    weights = (symbols.double() - 128) * scale[:, None].double()
    expected = x.double() @ weights.T
    error = float((single.multiply(x).double() - expected).norm() / expected.norm())
    assert error < 1e-4, error
    assert torch.equal(single.dequantize(torch.float32), (symbols.float() * scale[:, None] - 128 * scale[:, None]))
    del weights
    copies = max(4, DISTINCT_BYTES // matrix.size_bytes)
    matrices = [CudaMatrix([_copy(matrix)], DEVICE) for _ in range(copies)]
    x = x.bfloat16()
    y = torch.empty(1, rows, device=DEVICE).bfloat16()
    result = summary(graph_times(lambda i: matrices[i].product(1, x.dtype)(x, y), copies))
    out = torch.empty(rows, columns, dtype=torch.bfloat16, device=DEVICE)
    dense = graph_times(lambda i: matrices[i].dequantize_into(out), min(copies, 10))
    plan = single.plan(1)
    return {
        **result,
        "bits": matrix.size_bytes * 8 / (rows * columns),
        "error": error,
        "decode_us": statistics.median(dense),
        "blocks": plan.blocks,
        "slots": plan.slots,
        "chunk_bytes": matrix.chunks.largest_bytes,
        "chunks": matrix.shape.chunks,
        "segments": matrix.shape.segments,
        "raw_bits": matrix.code.raw_bits,
    }


def measure_flat(rows: int, columns: int, entropy: float, distinct_bytes: int) -> dict[str, float]:
    """Ours with flat matrices, checked against float64; with few distinct bytes, weights stay in the cache."""
    symbols, scale = random_symbols(rows, columns, entropy)
    part = pack_flat("weights", symbols, scale, scale * -128)
    copies = max(1, distinct_bytes // part.size_bytes)
    matrices = [FlatCudaMatrix([replace(part, data=part.data.clone())], DEVICE) for _ in range(copies)]
    x = torch.randn(1, columns, device=DEVICE).bfloat16()
    y = torch.empty(1, rows, device=DEVICE).bfloat16()
    expected = x.double() @ ((symbols.double() - 128) * scale[:, None].double()).T
    assert float((matrices[0].multiply(x).double() - expected).norm() / expected.norm()) < 4e-3
    times = graph_times(lambda i: matrices[i % copies].product(1, x.dtype)(x, y), max(copies, LAUNCHES))
    return {**summary(times), "bits": part.size_bytes * 8 / (rows * columns)}


def _copy(matrix: DeviceMatrix) -> DeviceMatrix:
    return replace(matrix, chunks=replace(matrix.chunks, data=matrix.chunks.data.clone()))


def main() -> None:
    """Print a table and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--once", action="store_true", help="launch each kernel once and time nothing")
    arguments = parser.parse_args()
    if arguments.once:
        for (rows, columns), entropy in itertools.product(SHAPES, SOURCES):
            launch_once(rows, columns, entropy)
        return
    results = []
    for rows, columns in SHAPES:
        bf16 = measure_bf16(rows, columns)
        int8, int4 = (measure_uncoded(bits, rows, columns) for bits in (8, 4))
        others = ((bf16, "bf16"), (int8, "int8"), (int4, "int4"))
        print(
            f"{rows} x {columns}: " + ", ".join(f"{name} {of['median_us']:.2f} us" for of, name in others), flush=True
        )
        for entropy in SOURCES:
            ours = measure_coded(rows, columns, entropy)
            us = ours["median_us"]
            print(
                f"  {ours['bits']:.3f} bits {us:7.2f} us ({ours['min_us']:.2f} - {ours['max_us']:.2f}); "
                + "".join(f"x {name} {of['median_us'] / us:.2f}, " for of, name in others)
                + f"to memory {ours['decode_us']:.1f} us; error {ours['error']:.1e}",
                flush=True,
            )
            row = {"rows": rows, "columns": columns, "entropy": entropy}
            results.append({**row, "bf16": bf16, "int8": int8, "int4": int4, "ours": ours})
    if arguments.json:
        document = {"device": torch.cuda.get_device_name(DEVICE), "commit": commit(), "results": results}
        arguments.json.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
