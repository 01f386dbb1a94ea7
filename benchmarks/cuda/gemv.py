"""Time fused decode + product against cuBLAS bfloat16 and an int8 product, one vector, over distinct weights.

    python benchmarks/cuda/gemv.py --json results.json
    ncu --clock-control none -k regex:"multiply|decode" --section SpeedOfLight --section SchedulerStats \\
        --section WarpStateStats --section MemoryWorkloadAnalysis python benchmarks/cuda/gemv.py --once
"""

from __future__ import annotations

import argparse
import ctypes
import itertools
import json
import math
import statistics
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from entrollm.hf.cuda import compile as kernels
from entrollm.hf.cuda.launch import Function
from entrollm.hf.cuda.matrix import CudaMatrix, DeviceMatrix, transcode

SOURCES = (1.47, 2.2, 3.2, 5.6)
SHAPES = ((14336, 4096), (4096, 14336), (4096, 4096))
DEVICE = torch.device("cuda", 0)
# Of weights in every measurement, so that the second-level cache holds none of them.
DISTINCT_BYTES = 600 << 20
REPLAYS = 15


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


def summary(times: list[float]) -> dict[str, float]:
    """Median, least and largest microseconds."""
    return {"median_us": statistics.median(times), "min_us": min(times), "max_us": max(times)}


def measure_bf16(rows: int, columns: int) -> dict[str, float]:
    """cuBLAS through torch."""
    copies = max(4, DISTINCT_BYTES * 3 // (2 * rows * columns))
    weights = [torch.randn(rows, columns, device=DEVICE).bfloat16() for _ in range(copies)]
    x = torch.randn(1, columns, device=DEVICE).bfloat16()
    y = torch.empty(1, rows, device=DEVICE).bfloat16()
    return summary(graph_times(lambda i: torch.matmul(x, weights[i].T, out=y), copies))


def measure_int8(rows: int, columns: int) -> dict[str, float]:
    """The hand-written baseline, checked against float64."""
    copies = max(4, DISTINCT_BYTES * 2 // (rows * columns))
    weights = [torch.randint(-127, 128, (rows, columns), device=DEVICE, dtype=torch.int8) for _ in range(copies)]
    scale = torch.rand(rows, device=DEVICE)
    x = torch.randn(columns, device=DEVICE).bfloat16()
    y = torch.empty(rows, device=DEVICE).bfloat16()
    cubin = kernels.compile_source(
        (Path(__file__).parent / "int8.cu").read_text(), torch.cuda.get_device_capability(DEVICE), ()
    )
    from cuda.core import ObjectCode

    function = Function(ObjectCode.from_cubin(cubin).get_kernel("multiply_int8"), DEVICE, columns)
    values = [ctypes.c_void_p(0), *(ctypes.c_void_p(t.data_ptr()) for t in (scale, x, y))]
    values += [ctypes.c_int(rows), ctypes.c_int(columns)]

    def run(blocks: int) -> dict[str, float]:
        def launch(i: int) -> None:
            values[0] = ctypes.c_void_p(weights[i].data_ptr())
            function.launch(values, blocks, 256, overlap=True)

        launch(0)
        expected = weights[0].double() @ x.double() * scale
        assert (y.double() - expected).norm() < 0.02 * expected.norm()
        return summary(graph_times(launch, copies))

    processors = torch.cuda.get_device_properties(DEVICE).multi_processor_count
    return min((run(processors * blocks) for blocks in (2, 3, 4)), key=lambda found: found["median_us"])


def launch_once(rows: int, columns: int, entropy: float) -> None:
    """One product and one decoding to memory, for a profiler."""
    matrix = CudaMatrix.from_parts([random_matrix(rows, columns, entropy)[2]], DEVICE)
    matrix.multiply(torch.randn(1, columns, device=DEVICE).bfloat16())
    matrix.dequantize(torch.bfloat16)
    torch.cuda.synchronize()


def random_matrix(rows: int, columns: int, entropy: float) -> tuple[Tensor, Tensor, DeviceMatrix]:
    """Gaussian symbols of an entropy about 128, a scale for each row, and both in the layout."""
    symbols = torch.randn(rows, columns, device=DEVICE).mul_(gaussian_deviation(entropy)).round_().add_(128)
    symbols = symbols.clamp_(0, 255).to(torch.uint8)
    scale = torch.rand(rows, device=DEVICE) + 0.5
    return symbols, scale, transcode("weights", symbols, scale, scale * -128)


def measure_coded(rows: int, columns: int, entropy: float) -> dict[str, float]:
    """Ours, checked against float64 and the symbols it was made from."""
    symbols, scale, matrix = random_matrix(rows, columns, entropy)
    single = CudaMatrix.from_parts([matrix], DEVICE)
    x = torch.randn(1, columns, device=DEVICE)
    weights = (symbols.double() - 128) * scale[:, None].double()
    expected = x.double() @ weights.T
    error = float((single.multiply(x).double() - expected).norm() / expected.norm())
    assert error < 1e-4, error
    assert torch.equal(single.dequantize(torch.float32), (symbols.float() * scale[:, None] - 128 * scale[:, None]))
    del weights
    copies = max(4, DISTINCT_BYTES // matrix.size_bytes)
    matrices = [CudaMatrix.from_parts([_copy(matrix)], DEVICE) for _ in range(copies)]
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
        "chunk_bytes": matrix.packed.chunk_bytes,
        "chunks": matrix.shape.chunks,
        "segments": matrix.shape.segments,
        "raw_bits": matrix.code.raw_bits,
    }


def _copy(matrix: DeviceMatrix) -> DeviceMatrix:
    return replace(matrix, packed=replace(matrix.packed, data=matrix.packed.data.clone()))


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
        bf16, int8 = measure_bf16(rows, columns), measure_int8(rows, columns)
        print(f"{rows} x {columns}: bf16 {bf16['median_us']:.2f} us, int8 {int8['median_us']:.2f} us", flush=True)
        for entropy in SOURCES:
            ours = measure_coded(rows, columns, entropy)
            us = ours["median_us"]
            print(
                f"  {ours['bits']:.3f} bits {us:7.2f} us ({ours['min_us']:.2f} - {ours['max_us']:.2f}); "
                f"x bf16 {bf16['median_us'] / us:.2f}, x int8 {int8['median_us'] / us:.2f}; "
                f"to memory {ours['decode_us']:.1f} us; error {ours['error']:.1e}",
                flush=True,
            )
            row = {"rows": rows, "columns": columns, "entropy": entropy}
            results.append({**row, "bf16": bf16, "int8": int8, "ours": ours})
    if arguments.json:
        document = {"device": torch.cuda.get_device_name(DEVICE), "commit": commit(), "results": results}
        arguments.json.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
