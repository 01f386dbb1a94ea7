"""Predict tokens per second of GPUs from instructions and bytes, and check the model on the GPU at hand.

    python benchmarks/cuda/speed_model.py --measure speed.json     # on a GPU, once for each path
    python benchmarks/cuda/speed_model.py --flat --measure speed-flat.json
    python benchmarks/cuda/speed_model.py speed.json speed-8.0.json speed-8.9.json

The time of a product is max(instructions, bytes) + launch. Matrices that stay in the second-level cache give the time
of instructions and of a launch: two sizes with equal work for all multiprocessors, whose difference is the first and
the rest the second. The instructions of long rows, which leave less shared memory for weights, are those of the
distinct matrix of 4096 x 14336. The other distinct matrices say how well the model predicts.
ENTROLLM_CUDA_TARGET=8.0 or 8.9 measures the kernels of older GPUs, with their shared memory, on a newer one.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SOURCES = (1.47, 2.2, 3.2, 5.6)
COLUMNS = 4096
# Tiles of each multiprocessor in the two matrices that stay in the second-level cache.
CACHED_TILES = (3, 5)
SHAPES = ((14336, 4096), (4096, 14336), (4096, 4096))
LONG_SHAPE = (4096, 14336)
CHECKED = ((14336, 4096), (4096, 4096))
LONG_COLUMNS = 8192  # rows of more are long
FIRST_PATH = "9.0"  # the one with products without a code, which are the same for all
# Of the published bandwidth, what products that wait for memory alone reach: cuBLAS with bfloat16 on an H200.
SHARE = 0.9
# Bits in GPU memory of weights without a code: int4 with a 16-bit scale for every 128 columns.
UNCODED_BITS = {"bf16": 16.0, "int8": 8.0, "int4": 4.125}
# Matrices of a token in Llama-3-8B, as they are launched: (rows, columns), and how often.
LLAMA_3_8B = (((6144, 4096), 32), ((4096, 4096), 32), ((28672, 4096), 32), ((4096, 14336), 32), ((128256, 4096), 1))


@dataclass(frozen=True)
class Card:
    """A GPU as its maker describes it.

    Attributes:
        multiprocessors: their number.
        clock_ghz: the boost clock.
        bandwidth_gbs: of its memory, in 10^9 bytes per second.
        path: the capability of the kernels that it runs.
        memory_gb: of its memory.
    """

    multiprocessors: int
    clock_ghz: float
    bandwidth_gbs: float
    path: str
    memory_gb: int


# Sources: NVIDIA H200 data sheet; Ampere GA102 whitepaper and the product page of the GeForce RTX 3060; Ada whitepaper
# (RTX 4090); RTX Blackwell whitepaper (RTX 5090); L4 data sheet and Ada's 128 cores per multiprocessor; Jetson Orin NX
# and Orin Nano series data sheets (16 GB and 8 GB modules, without their later "Super" modes). Pages that quote these
# agree on the multiprocessors, clocks and bandwidths of the four cards and of the Orin Nano; the H200's clock is what
# nvidia-smi shows. No such page was found for the clock of the Orin NX.
CARDS = {
    "H200": Card(132, 1.98, 4800, "9.0", 141),
    "RTX 3060": Card(28, 1.777, 360, "8.9", 12),
    "RTX 4090": Card(128, 2.52, 1008, "8.9", 24),
    "RTX 5090": Card(170, 2.407, 1792, "8.9", 32),
    "L4": Card(58, 2.04, 300, "8.9", 24),
    "Orin NX": Card(8, 0.918, 102.4, "8.0", 16),
    "Orin Nano": Card(8, 0.625, 68, "8.0", 8),
}


@dataclass(frozen=True)
class Rate:
    """What a kind of product costs.

    Attributes:
        bits: of a weight in GPU memory.
        cycles: of a multiprocessor for a weight.
        long_cycles: the same in long rows.
        launch_us: of a launch, on the GPU that was measured.
    """

    bits: float
    cycles: float
    long_cycles: float
    launch_us: float

    def product_us(self, rows: int, columns: int, card: Card) -> tuple[float, str]:
        """Microseconds of a product with one vector, and what bounds it."""
        tiles = -(-rows // (16 * card.multiprocessors))  # of the multiprocessor with the most
        cycles = self.long_cycles if columns > LONG_COLUMNS else self.cycles
        instructions = tiles * 16 * columns * cycles / (card.clock_ghz * 1e3)
        memory = rows * columns * self.bits / 8 / (card.bandwidth_gbs * SHARE * 1e3)
        return max(instructions, memory) + self.launch_us, "memory" if memory > instructions else "instructions"

    def tokens(self, card: Card) -> tuple[float, str]:
        """Tokens per second that the products of Llama-3-8B allow, and what bounds most of their time."""
        total, bound = 0.0, {"memory": 0.0, "instructions": 0.0}
        for (rows, columns), count in LLAMA_3_8B:
            each, by = self.product_us(rows, columns, card)
            total += each * count
            bound[by] += each * count
        return 1e6 / total, max(bound, key=lambda by: bound[by])


def _uncoded_us(name: str, rows: int, columns: int, distinct_bytes: int) -> float:
    import gemv

    if name == "bf16":
        return gemv.measure_bf16(rows, columns, distinct_bytes)["median_us"]
    return gemv.measure_uncoded(8 if name == "int8" else 4, rows, columns, distinct_bytes)["median_us"]


def measure(is_flat: bool) -> dict[str, Any]:
    """Measure flat products on the GPU at hand, or all others; see the module's text."""
    import torch

    import gemv

    properties = torch.cuda.get_device_properties(gemv.DEVICE)
    target = os.environ.get("ENTROLLM_CUDA_TARGET")
    tile_rows = 16 * properties.multi_processor_count
    major, minor = torch.cuda.get_device_capability(gemv.DEVICE)
    return {
        "device": properties.name,
        "commit": gemv.commit(),
        "multiprocessors": properties.multi_processor_count,
        "clock_ghz": CARDS["H200"].clock_ghz,
        "path": target or f"{major}.{minor}",
        "kinds": measure_flat(tile_rows) if is_flat else measure_others(tile_rows, target),
    }


def measure_flat(tile_rows: int) -> dict[str, Any]:
    """Measure flat products; `tile_rows` are the rows of one tile of each multiprocessor."""
    import gemv

    kinds = {}
    for entropy in SOURCES:
        shapes = {f"{rows} x {columns}": gemv.measure_flat(rows, columns, entropy, 1 << 29) for rows, columns in SHAPES}
        kinds[f"flat {entropy}"] = {
            "bits": shapes["14336 x 4096"]["bits"],
            "cached_us": [
                gemv.measure_flat(tiles * tile_rows, COLUMNS, entropy, 1)["median_us"] for tiles in CACHED_TILES
            ],
            "distinct_us": {shape: found["median_us"] for shape, found in shapes.items()},
            "spread_us": {shape: [found["min_us"], found["max_us"]] for shape, found in shapes.items()},
        }
        print(kinds[f"flat {entropy}"], flush=True)
    return kinds


def measure_others(tile_rows: int, target: str | None) -> dict[str, Any]:
    """Measure coded products, and for the GPU's own path those without a code."""
    import torch

    import gemv

    kinds: dict[str, Any] = {}
    for name, bits in UNCODED_BITS.items() if target is None else ():  # whose kernels are the same for all targets
        sizes = [tiles * tile_rows for tiles in CACHED_TILES]
        cached = [_uncoded_us(name, rows, COLUMNS, 1) for rows in sizes] if name != "bf16" else None
        shapes = {f"{rows} x {columns}": _uncoded_us(name, rows, columns, 1 << 30) for rows, columns in SHAPES}
        kinds[name] = {"bits": bits, "cached_us": cached, "distinct_us": shapes}
        print(name, kinds[name], flush=True)
    for entropy in SOURCES:
        cached = []
        for tiles in CACHED_TILES:
            matrix = gemv.CudaMatrix([gemv.random_matrix(tiles * tile_rows, COLUMNS, entropy)[2]], gemv.DEVICE)
            x = torch.randn(1, COLUMNS, device=gemv.DEVICE).bfloat16()
            y = torch.empty(1, tiles * tile_rows, device=gemv.DEVICE).bfloat16()
            product = matrix.product(1, x.dtype)
            cached.append(statistics.median(gemv.graph_times(lambda _, call=product, x=x, y=y: call(x, y), 20)))
        measured = {f"{rows} x {columns}": gemv.measure_coded(rows, columns, entropy) for rows, columns in SHAPES}
        kinds[f"entropy {entropy}"] = {
            "bits": measured["14336 x 4096"]["bits"],
            "cached_us": cached,
            "distinct_us": {shape: found["median_us"] for shape, found in measured.items()},
            "spread_us": {shape: [found["min_us"], found["max_us"]] for shape, found in measured.items()},
        }
        print(entropy, kinds[f"entropy {entropy}"], flush=True)
    return kinds


def rates(measured: dict[str, Any]) -> dict[str, Rate]:
    """The costs of each kind of product, from the two cached matrices."""
    found = {}
    rows, columns = LONG_SHAPE
    long_tiles = -(-rows // (16 * measured["multiprocessors"]))
    for name, kind in measured["kinds"].items():
        # Products with bfloat16, which need no decoding, wait for memory alone.
        few, many = kind["cached_us"] or [measured["kinds"]["int8"]["cached_us"][0]] * 2
        tile_us = (many - few) / (CACHED_TILES[1] - CACHED_TILES[0])
        cycles = tile_us * measured["clock_ghz"] * 1e3 / (16 * COLUMNS)
        launch_us = few - tile_us * CACHED_TILES[0]
        long_cycles = cycles
        if name not in UNCODED_BITS:
            long_us = kind["distinct_us"][f"{rows} x {columns}"] - launch_us
            long_cycles = long_us * measured["clock_ghz"] * 1e3 / (long_tiles * 16 * columns)
        found[name] = Rate(kind["bits"], cycles, long_cycles, launch_us)
    if "bf16" in found:
        found["bf16"] = Rate(found["bf16"].bits, 0.0, 0.0, found["int8"].launch_us)
    return found


def _joined(values: list[float], digits: int) -> str:
    return ", ".join(f"{value:.{digits}f}" for value in values)


def report(files: list[Path]) -> None:
    """Print how well the model predicts what was measured, and what it predicts for other GPUs, as Markdown."""
    paths: dict[str, dict[str, Any]] = {}
    for file in files:
        measured = json.loads(file.read_text())
        kinds = paths.setdefault(measured["path"], measured)["kinds"]
        kinds |= measured["kinds"]
    by_path = {path: rates(measured) for path, measured in paths.items()}
    print("| path | product | bits | cycles a weight | in long rows | launch, µs | measured, µs | model, µs | ratio |")
    print("|---|---|---|---|---|---|---|---|---|")
    for path, measured in paths.items():
        for name, rate in by_path[path].items():
            us = [measured["kinds"][name]["distinct_us"][f"{rows} x {columns}"] for rows, columns in CHECKED]
            model = [rate.product_us(rows, columns, CARDS["H200"])[0] for rows, columns in CHECKED]
            print(
                f"| {path} | {name} | {rate.bits:.2f} | {rate.cycles:.3f} | {rate.long_cycles:.3f} "
                f"| {rate.launch_us:.1f} | {_joined(us, 1)} | {_joined(model, 1)} "
                f"| {_joined([m / u for m, u in zip(model, us, strict=True)], 2)} |"
            )
    names = list(by_path[FIRST_PATH])
    print("\nPredicted tokens per second of the products of Llama-3-8B (m: bound by memory, i: by instructions)\n")
    print("| GPU | " + " | ".join(names) + " |")
    print("|---|" + "---|" * len(names))
    for card_name, card in CARDS.items():
        cells = []
        for name in names:
            rate = by_path[card.path].get(name) or by_path[FIRST_PATH][name]
            tokens, bound = rate.tokens(card)
            weights = sum(rows * columns * count for (rows, columns), count in LLAMA_3_8B)
            fits = weights * rate.bits / 8 < card.memory_gb * 0.9e9
            cells.append(f"{tokens:.0f} {bound[0]}" if fits else "-")
        print(f"| {card_name} | " + " | ".join(cells) + " |")


def main() -> None:
    """Measure, or print what measurements say."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", type=Path, nargs="*", help="measurements to report on")
    parser.add_argument("--measure", type=Path, metavar="FILE", help="measure and write FILE")
    parser.add_argument("--flat", action="store_true", help="measure flat products, and no others")
    arguments = parser.parse_args()
    if arguments.measure:
        arguments.measure.write_text(json.dumps(measure(arguments.flat), indent=1) + "\n")
    if arguments.files:
        report(arguments.files)


if __name__ == "__main__":
    main()
