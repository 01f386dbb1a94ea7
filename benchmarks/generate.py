"""Tokens per second of Llama-shaped models, ours and llama.cpp's in turns: single tokens, and a prompt of 512.

usage: python benchmarks/generate.py [SHAPE] [--folder FOLDER] [--rounds N] [--threads N] [--json FILE]
                                     [--build NAME=FOLDER ...]

Models are made as needed in FOLDER, where later runs find them. Every round visits every model: a short prompt and
some tokens, chosen greedily by both; the first rounds also a long prompt. Every build of llama.cpp runs in processes of
its own; its best counts.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import llama_cpp

from common import finish
from entrollm.compress import CodingOptions, compress_folder
from entrollm.engine.load import load
from entrollm.engine.model import Model
from entrollm.format.reader import CompressedModel
from entrollm.threads import default_threads
from llamacpp import TYPES, write_gguf
from make_model import SHAPES, write_model
from visit import Visit, visit_model

# Entropies of the sources whose codes come to about 5.2, 4.6, 3.75, 3.3 and 2.4 stored bits.
ENTROPIES = (5.0, 4.4, 3.6, 3.15, 2.3)
# (largest stored bits of ours, llama.cpp type of equal quality, goal for the ratio of speeds)
GOALS = ((4.7, "Q4_K_M", 1.1), (5.3, "Q5_K_M", 1.4), (3.9, "Q3_K_M", 1.6), (3.35, "IQ3_S", 2.0), (3.35, "Q8_0", 2.2))


def main() -> None:
    """Run, print the tables, and end with JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("shape", nargs="?", choices=SHAPES, default="1.1B")
    parser.add_argument("--folder", type=Path, default=Path("/tmp/entrollm-benchmarks"))
    parser.add_argument("--entropies", type=float, nargs="*", default=ENTROPIES)
    parser.add_argument("--types", nargs="*", choices=TYPES, default=list(TYPES))
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--long-rounds", type=int, default=2, help="rounds with a prompt of 512 tokens")
    parser.add_argument("--threads", type=int, default=default_threads())
    parser.add_argument("--pause", type=float, default=0.0, help="seconds that the machine has for others in between")
    parser.add_argument("--build", nargs="*", default=["installed="], help="NAME=FOLDER of llama.cpp's libraries")
    parser.add_argument("--prepare", action="store_true", help="only make the models")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    builds = dict(text.split("=", 1) for text in arguments.build)
    contenders = prepare(arguments.shape, arguments.folder, arguments.entropies, arguments.types, builds)
    if arguments.prepare:
        return
    for index in range(arguments.rounds):
        for contender in contenders:
            contender.visit(arguments.threads, arguments.tokens, index < arguments.long_rounds)
            time.sleep(arguments.pause)
        rows = [contender.summary() for contender in contenders]
        ratios = compare(rows)
        report(rows, ratios)
        # After every round: what was measured is kept, whatever ends a later one.
        finish(
            {
                "benchmark": "generate",
                "shape": arguments.shape,
                "threads": arguments.threads,
                "tokens": arguments.tokens,
                "llama_cpp_python": llama_cpp.__version__,
                "rows": rows,
                "ratios": ratios,
            },
            arguments.json,
        )


def prepare(
    shape: str, folder: Path, entropies: Sequence[float], types: Sequence[str], builds: Mapping[str, str]
) -> list[Contender]:
    """Make the models that FOLDER lacks."""
    contenders = []
    weights = weight_count(SHAPES[shape])
    for entropy in entropies:
        path = folder / f"{shape}-{entropy}"
        if not path.exists():
            checkpoint = folder / f"{shape}-{entropy}-checkpoint"
            if checkpoint.exists():
                shutil.rmtree(checkpoint)
            write_model(SHAPES[shape], checkpoint, entropy)
            compress_folder(checkpoint, path, CodingOptions(bits=8, prefer="speed"))
            shutil.rmtree(checkpoint)
        size = CompressedModel.open(path).file_bytes()
        contenders.append(Contender(f"entrollm H={entropy}", path, visit_ours, size, weights, entropy))
    for kind in types:
        path = folder / f"{shape}-{kind}.gguf"
        if not path.exists():
            unfinished = path.with_suffix(".partial")
            write_gguf(SHAPES[shape], kind, unfinished)
            unfinished.rename(path)
        for build, libraries in builds.items():
            visit = partial(visit_peer, libraries)
            contenders.append(Contender(kind, path, visit, path.stat().st_size, weights, build=build))
    return contenders


def weight_count(shape: dict[str, Any]) -> int:
    """Weights of a model's matrices."""
    hidden, inner = shape["hidden"], shape["inner"]
    kv = hidden // shape["heads"] * shape["kv_heads"]
    layer = 2 * hidden * hidden + 2 * kv * hidden + 3 * inner * hidden
    return int(shape["layers"] * layer + (1 if shape["tied"] else 2) * shape["vocab"] * hidden)


class Ours:
    """A compressed model in EntroLLM."""

    def __init__(self, path: Path, threads: int) -> None:
        self._model: Model = load(path, threads)

    def generate(self, prompt: list[int], count: int) -> tuple[float, float, list[int]]:
        """Continue a prompt greedily: seconds for the prompt, seconds for all tokens after the first, the tokens."""
        stream = self._model.stream(prompt, max_tokens=count, temperature=0.0)
        for _ in stream:
            pass
        result = stream.result
        if len(result.token_ids) != count:
            raise RuntimeError(f"the text ended after {len(result.token_ids)} of {count} tokens")
        return result.prefill_s, result.decode_s, list(result.token_ids)

    def close(self) -> None:
        """Let go of the model."""
        del self._model
        gc.collect()


def visit_ours(path: Path, threads: int, count: int, long: bool) -> Visit:
    """Time our model once."""
    model = Ours(path, threads)
    try:
        return visit_model(model, count, long)
    finally:
        model.close()


def visit_peer(libraries: str, path: Path, threads: int, count: int, long: bool) -> Visit:
    """Time llama.cpp once, in a process with one build of its libraries."""
    command = [sys.executable, str(Path(__file__).parent / "llamacpp.py"), str(path), str(threads), str(count)]
    environment = {**os.environ, "LLAMA_CPP_LIB_PATH": libraries} if libraries else dict(os.environ)
    command += ["--long"] if long else []
    found = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
    return Visit(**json.loads(found.stdout))


@dataclass
class Contender:
    """One model file and what was measured with it."""

    name: str
    path: Path
    run: Callable[[Path, int, int, bool], Visit]
    size_bytes: int
    weights: int
    entropy: float | None = None
    build: str = ""
    visits: list[Visit] = field(default_factory=list)

    def visit(self, threads: int, count: int, long: bool) -> None:
        """Open the model, warm up, wait for the machine to be idle, and time it."""
        found = self.run(self.path, threads, count, long)
        if self.visits and found.tokens != self.visits[0].tokens:
            raise AssertionError(f"{self.name}: the same prompt gave another text")
        self.visits.append(found)

    def summary(self) -> dict[str, Any]:
        """Sizes and speeds."""
        rates = [visit.rate for visit in self.visits]
        prompts = [visit.prompt_rate for visit in self.visits if visit.prompt_rate is not None]
        return {
            "name": self.name,
            "build": self.build,
            "ours": self.entropy is not None,
            "entropy_bits": self.entropy,
            "file_bytes": self.size_bytes,
            "file_bits": 8 * self.size_bytes / self.weights,
            "weights": self.weights,
            "best_rate": max(rates),
            "median_rate": statistics.median(rates),
            "worst_rate": min(rates),
            "rates": rates,
            "others": [visit.others for visit in self.visits],
            "prompt_rates": prompts,
            "prompt_rate": max(prompts, default=None),
        }


def compare(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Our largest model within each goal's bits over the llama.cpp type of the goal, both at their best."""
    ratios = []
    for bits, kind, goal in GOALS:
        ours = [row for row in rows if row["ours"] and row["file_bits"] <= bits]
        peers = sorted((row for row in rows if row["name"] == kind), key=lambda row: -row["best_rate"])
        if not ours or not peers:
            continue
        best, peer = max(ours, key=lambda row: row["file_bits"]), peers[0]
        ratios.append(
            {
                "ours_bits": best["file_bits"],
                "peer": kind,
                "peer_bits": peer["file_bits"],
                "ratio_best": best["best_rate"] / peer["best_rate"],
                "ratio_median": best["median_rate"] / peer["median_rate"],
                "goal": goal,
            }
        )
    return ratios


def report(rows: list[dict[str, Any]], ratios: list[dict[str, Any]]) -> None:
    """Print the tables."""
    print(f"{'model':18} {'MB':>6} {'bits':>6} {'tok/s':>7} {'median':>7} {'prompt':>7} {'others':>7}")
    for row in rows:
        print(
            f"{row['name'] + ' ' + row['build']:18} {row['file_bytes'] / 1e6:6.0f} {row['file_bits']:6.3f} "
            f"{row['best_rate']:7.2f} {row['median_rate']:7.2f} {row['prompt_rate'] or math.nan:7.1f} "
            f"{100 * statistics.median(row['others']):6.0f}%"
        )
    print(f"\n{'ours':>6} {'over':8} {'bits':>6} {'best':>6} {'median':>7} {'goal':>5}")
    for row in ratios:
        print(
            f"{row['ours_bits']:6.2f} {row['peer']:8} {row['peer_bits']:6.2f} {row['ratio_best']:6.2f} "
            f"{row['ratio_median']:7.2f} {row['goal']:5.1f}"
        )


if __name__ == "__main__":
    main()
