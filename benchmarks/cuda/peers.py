"""Other ways to multiply with compressed weights on this GPU, in one run with ours; those not installed are named.

    pip install nvidia-nvcomp-cu13 && pip install --no-deps dfloat11
    python benchmarks/cuda/peers.py --json results.json

- int4: torch's weight-only product, which torchao's int4 is (groups of 128, bfloat16 scales and zeros).
- nvCOMP ANS: decoding of bytes to memory, at the best of several chunk sizes; a product would come on top.
- DFloat11: its kernel decodes bfloat16 weights to memory, cuBLAS multiplies.
- ours: the fused product, decoding to memory as bfloat16, and that followed by cuBLAS.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib.util
import json
import statistics
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from df11 import BLOCK_BITS, THREADS, Encoded, encode
from torch import Tensor

from entrollm.torch.cuda.launch import Function
from entrollm.torch.cuda.matrix import CudaMatrix
from gemv import (
    DEVICE,
    DISTINCT_BYTES,
    REPLAYS,
    commit,
    graph_times,
    measure_bf16,
    measure_coded,
    random_matrix,
    summary,
)

SHAPES = ((14336, 4096), (4096, 14336))
ENTROPIES = (1.47, 2.2, 3.2)
GROUP = 128
CHUNKS = (1 << 16, 1 << 17, 1 << 18)
Result = dict[str, Any]


def measure_int4(rows: int, columns: int) -> Result:
    """Torch's int4 weight-only product, checked against the dequantized weights."""
    copies = max(4, DISTINCT_BYTES * 2 // (rows * columns))
    scale = torch.rand(columns // GROUP, rows, device=DEVICE).bfloat16() + 0.5
    zero = torch.randn_like(scale)
    x = torch.randn(1, columns, device=DEVICE).bfloat16()

    def make() -> tuple[Tensor, Tensor]:
        levels = torch.randint(0, 16, (rows, columns), device=DEVICE, dtype=torch.uint8)
        pairs = (levels[:, ::2] << 4 | levels[:, 1::2]).contiguous()
        return levels, torch.ops.aten._convert_weight_to_int4pack(pairs, 8)

    pairs = torch.stack([scale, zero], 2).contiguous()
    levels, first = make()
    packed = [first, *(make()[1] for _ in range(copies - 1))]
    spread = [part.T.repeat_interleave(GROUP, 1).double() for part in (scale, zero)]
    expected = x.double() @ ((levels.double() - 8) * spread[0] + spread[1]).T

    def launch(i: int) -> Tensor:
        return torch.ops.aten._weight_int4pack_mm(x, packed[i], GROUP, pairs)

    error = float((launch(0).double() - expected).norm() / expected.norm())
    assert error < 0.02, error
    return {**summary(graph_times(launch, copies)), "bits": 4 + 32 / GROUP, "error": error}


def measure_nvcomp(rows: int, columns: int, entropy: float) -> Result:
    """Decoding of a matrix of symbols, a byte each, by nvCOMP's ANS."""
    from nvidia import nvcomp

    symbols = random_matrix(rows, columns, entropy)[0].reshape(-1)
    copies = max(4, DISTINCT_BYTES // symbols.numel())
    stream = torch.cuda.Stream()
    found: list[Result] = []
    for chunk in CHUNKS:
        codec = nvcomp.Codec(
            algorithm="ANS", data_type="|u1", uncomp_chunk_size=chunk, cuda_stream=stream.cuda_stream, device_id=0
        )
        torch.cuda.synchronize()
        encoded = [codec.encode(nvcomp.as_array(symbols)) for _ in range(copies)]
        config = codec.decompression_config(encoded[0])
        outputs = [torch.empty_like(symbols) for _ in range(copies)]
        stream.synchronize()

        def decode(i: int, codec: Any = codec, encoded: Any = encoded, outputs: Any = outputs, c: Any = config) -> None:
            codec.decode(encoded[i], out=outputs[i], decompression_config=c)

        times = _stream_times(decode, copies, stream)
        assert all(torch.equal(output, symbols) for output in outputs)
        us = statistics.median(times)
        rates = {"bits": encoded[0].buffer_size * 8 / symbols.numel(), "decoded_gb_per_s": symbols.numel() / us / 1e3}
        found.append({**summary(times), **rates, "chunk_bytes": chunk})
    return min(found, key=lambda row: row["median_us"])


def measure_dfloat11(rows: int, columns: int) -> Result:
    """DFloat11's own kernel, then cuBLAS; checked for equal bits."""
    from cuda.core import ObjectCode

    spec = importlib.util.find_spec("dfloat11")
    assert spec is not None
    assert spec.submodule_search_locations is not None
    source = Path(spec.submodule_search_locations[0]) / "decode.ptx"
    weights = (torch.randn(rows, columns, device=DEVICE) * columns**-0.5).bfloat16()
    first = encode(weights)
    function = Function(ObjectCode.from_ptx(source.read_bytes()).get_kernel("decode"), DEVICE, first.shared_bytes)
    copies = max(4, DISTINCT_BYTES // len(first.rest))
    parts = [Encoded(*(getattr(first, name).clone() for name in Encoded.__dataclass_fields__)) for _ in range(copies)]
    out = torch.empty(rows * columns + (1 << 16), dtype=torch.bfloat16, device=DEVICE)
    decoded = out[: rows * columns].view(rows, columns)
    blocks = -(-first.stream_bytes * 8 // BLOCK_BITS)

    def decode(i: int) -> None:
        part = parts[i]
        tensors = (part.tables, part.exponents, part.rest, part.positions, part.gaps, out)
        counts = (len(part.tables), part.stream_bytes, len(part.rest))
        arguments = [ctypes.c_void_p(tensor.data_ptr()) for tensor in tensors] + [ctypes.c_int(n) for n in counts]
        function.launch(arguments, blocks, THREADS, overlap=False)

    decode(0)
    assert torch.equal(decoded.view(torch.int16), weights.view(torch.int16))
    return {**_decode_then_multiply(decode, decoded, copies), "bits": first.bits}


def measure_ours(rows: int, columns: int, entropy: float) -> Result:
    """The fused product, and decoding to memory with and without cuBLAS behind it."""
    fused = measure_coded(rows, columns, entropy)
    _, _, part = random_matrix(rows, columns, entropy)
    copies = max(4, DISTINCT_BYTES // part.size_bytes)
    chunks = [replace(part.chunks, data=part.chunks.data.clone()) for _ in range(copies)]
    matrices = [CudaMatrix([replace(part, chunks=each)], DEVICE) for each in chunks]
    out = torch.empty(rows, columns, dtype=torch.bfloat16, device=DEVICE)
    apart = _decode_then_multiply(lambda i: matrices[i].dequantize_into(out), out, copies)
    return {**fused, "to_memory": apart}


def _decode_then_multiply(decode: Callable[[int], None], weights: Tensor, copies: int) -> Result:
    x = torch.randn(1, weights.shape[1], device=DEVICE).bfloat16()
    y = torch.empty(1, weights.shape[0], device=DEVICE).bfloat16()

    def both(i: int) -> None:
        decode(i)
        torch.matmul(x, weights.T, out=y)

    alone = summary(graph_times(decode, copies))
    rate = weights.numel() * 2 / alone["median_us"] / 1e3
    return {**summary(graph_times(both, copies)), "decode": alone, "decoded_gb_per_s": rate}


def _stream_times(launch: Callable[[int], None], copies: int, stream: torch.cuda.Stream) -> list[float]:
    """Microseconds of each of `copies` launches, queued on a stream one after the other."""
    times = []
    for _ in range(REPLAYS + 2):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record(stream)
        for i in range(copies):
            launch(i)
        end.record(stream)
        end.synchronize()
        times.append(begin.elapsed_time(end) * 1000 / copies)
    return times[2:]


def _missing() -> dict[str, str]:
    """Peers that are not installed."""
    missing = {}
    for peer, package in (("nvcomp", "nvidia.nvcomp"), ("dfloat11", "dfloat11")):
        try:
            found = importlib.util.find_spec(package) is not None
        except ModuleNotFoundError:
            found = False
        if not found:
            missing[peer] = f"{package} is not installed"
    return missing


def main() -> None:
    """Print a table and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--peers", default="bf16,int4,nvcomp,dfloat11,ours")
    arguments = parser.parse_args()
    missing = _missing()
    for peer, reason in missing.items():
        print(f"{peer}: left out, {reason}")
    results = []
    for rows, columns in SHAPES:
        row: Result = {"rows": rows, "columns": columns}
        measures: dict[str, Callable[[], Result]] = {
            "bf16": lambda r=rows, c=columns: measure_bf16(r, c),
            "int4": lambda r=rows, c=columns: measure_int4(r, c),
            "dfloat11": lambda r=rows, c=columns: measure_dfloat11(r, c),
        }
        for entropy in ENTROPIES:
            measures[f"nvcomp {entropy}"] = lambda r=rows, c=columns, e=entropy: measure_nvcomp(r, c, e)
            measures[f"ours {entropy}"] = lambda r=rows, c=columns, e=entropy: measure_ours(r, c, e)
        for name, measure in measures.items():
            peer = name.split()[0]
            if peer in arguments.peers.split(",") and peer not in missing:
                row[name] = measure()
                torch.cuda.empty_cache()
                print(f"{rows} x {columns} {name}: {_line(row[name])}", flush=True)
        results.append(row)
    if arguments.json:
        document = {
            "device": torch.cuda.get_device_name(DEVICE),
            "commit": commit(),
            "torch": torch.__version__,
            "missing": missing,
        }
        arguments.json.write_text(json.dumps({**document, "results": results}, indent=1) + "\n")


def _line(found: Result) -> str:
    text = f"{found['median_us']:.1f} us ({found['min_us']:.1f} - {found['max_us']:.1f})"
    if "bits" in found:
        text += f", {found['bits']:.2f} bits"
    for part in (found, found.get("to_memory", {})):
        if "decode" in part:
            text += f"; decoding {part['decode']['median_us']:.1f} us, with cuBLAS {part['median_us']:.1f} us"
        if "decoded_gb_per_s" in part:
            text += f", {part['decoded_gb_per_s']:.0f} GB/s decoded"
    return text


if __name__ == "__main__":
    main()
