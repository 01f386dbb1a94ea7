"""Run every benchmark into benchmarks/results, then make docs/benchmarks.md and its plot.

usage: python benchmarks/all.py [--folder FOLDER] [--threads N] [--shapes SHAPE ...] [--build NAME=FOLDER ...]
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

from entrollm.threads import default_threads
from make_model import SHAPES

HERE = Path(__file__).parent


def main() -> None:
    """Run them one after another."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", default="/tmp/entrollm-benchmarks", help="where models are made")
    parser.add_argument("--threads", type=int, default=default_threads())
    parser.add_argument("--build", nargs="*", default=["installed="], help="NAME=FOLDER of llama.cpp's libraries")
    parser.add_argument("--shapes", nargs="*", choices=SHAPES, default=list(SHAPES))
    arguments = parser.parse_args()
    threads = ["--threads", str(arguments.threads)]
    builds = ["--build", *arguments.build]
    _run("gemv", "gemv", ["--threads", *sorted({"1", str(arguments.threads)}, key=int)])
    _run("decode", "decode", [])
    _run("batch", "batch", threads)
    _run("load", "load", [*threads, "--folder", arguments.folder])
    for shape in arguments.shapes:
        _run("generate", f"generate-{shape}", [shape, *threads, "--folder", arguments.folder, *builds])
    subprocess.run([sys.executable, str(HERE / "report.py")], check=True)


def _run(script: str, name: str, options: list[str]) -> None:
    print(f"== {name}", flush=True)
    command = [sys.executable, str(HERE / f"{script}.py"), *options, "--json", str(HERE / "results" / f"{name}.json")]
    subprocess.run(command, check=True)


if __name__ == "__main__":
    main()
