"""Run every benchmark into benchmarks/results, then make docs/research/benchmarks.md and its plot.

usage: python benchmarks/all.py [--folder FOLDER] [--threads N] [--shapes SHAPE ...] [--build NAME=FOLDER ...]
       python benchmarks/all.py --quick [--folder FOLDER] [--threads N]

--quick shows in a few minutes that everything runs: little data, few repeats, the smallest model, no peers; its
results, page and plot go to FOLDER/quick.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

from entrollm.threads import default_threads
from make_model import SHAPES

HERE = Path(__file__).parent
QUICK = {
    "gemv": ["--gib", "0.0625", "--repeats", "4"],
    "decode": ["--mib", "1", "--repeats", "3"],
    "batch": ["--repeats", "2"],
    "load": ["--shape", "135M", "--runs", "2"],
    "generate": ["--rounds", "1", "--tokens", "8", "--entropies", "3.15", "--types"],
}


def main() -> None:
    """Run them one after another."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=Path("/tmp/entrollm-benchmarks"), help="where models are made")
    parser.add_argument("--threads", type=int, default=default_threads())
    parser.add_argument("--build", nargs="*", default=["installed="], help="NAME=FOLDER of llama.cpp's libraries")
    parser.add_argument("--shapes", nargs="*", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--quick", action="store_true", help="only show that everything runs")
    arguments = parser.parse_args()
    results, out = HERE / "results", HERE.parent / "docs"
    shapes, build = arguments.shapes, ["--build", *arguments.build]
    if arguments.quick:
        results = out = arguments.folder / "quick"
        results.mkdir(parents=True, exist_ok=True)
        shapes, build = ["135M"], []
    extra = QUICK if arguments.quick else {}
    threads = ["--threads", str(arguments.threads)]
    folder = ["--folder", str(arguments.folder)]

    def run(script: str, name: str, options: list[str]) -> None:
        print(f"== {name}", flush=True)
        command = [sys.executable, str(HERE / f"{script}.py"), *options, *extra.get(script, [])]
        subprocess.run([*command, "--json", str(results / f"{name}.json")], check=True)

    run("gemv", "gemv", ["--threads", *sorted({"1", str(arguments.threads)}, key=int)])
    run("decode", "decode", [])
    run("batch", "batch", threads)
    run("load", "load", [*threads, *folder])
    for shape in shapes:
        run("generate", f"generate-{shape}", [shape, *threads, *folder, *build])
    subprocess.run([sys.executable, str(HERE / "report.py"), "--results", str(results), "--out", str(out)], check=True)


if __name__ == "__main__":
    main()
