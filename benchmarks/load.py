"""From the start of Python to the first token of a model in the page cache, and the memory that it takes.

usage: python benchmarks/load.py [--shape SHAPE] [--folder FOLDER] [--runs N] [--threads N] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from common import finish, spread, wait_for_idle
from entrollm.threads import default_threads
from generate import prepare
from make_model import SHAPES

GOAL_S = 0.3
ENTROPY = 3.15
# Runs in a process of its own; prints the clock after every part, and what is resident.
_CHILD = """
import time
marks = {"interpreter": time.time()}
import sys
from entrollm.engine.load import load
marks["imports"] = time.time()
model = load(sys.argv[1], int(sys.argv[2]))
marks["open"] = time.time()
status = open("/proc/self/status").read().splitlines()
memory = {line.split(":")[0]: 1024 * int(line.split()[1]) for line in status if line.startswith("Rss")}
stream = model.stream([2, 3, 4, 5, 6, 7, 8, 9], max_tokens=1, temperature=0.0)
for _ in stream:
    pass
marks["first token"] = time.time()
import json
ids = list(stream.result.token_ids)
print(json.dumps({"marks": marks, "memory": memory, "torch": "torch" in sys.modules, "ids": ids}))
"""


def main() -> None:
    """Run, print the table, and end with JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="1.1B")
    parser.add_argument("--folder", type=Path, default=Path("/tmp/entrollm-benchmarks"))
    parser.add_argument("--runs", type=int, default=10)
    parser.add_argument("--threads", type=int, default=default_threads())
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    model = prepare(arguments.shape, arguments.folder, (ENTROPY,), (), {})[0]
    run(model.path, arguments.threads)
    wait_for_idle()
    runs = [run(model.path, arguments.threads) for _ in range(arguments.runs)]
    if any(found["torch"] for found in runs):
        raise AssertionError("running a model imported torch")
    if len({tuple(found["ids"]) for found in runs}) != 1:
        raise AssertionError("the same prompt gave different tokens")
    names = [*runs[0]["parts"], "total"]
    parts = {name: spread([found["parts"].get(name, found["total"]) for found in runs], "_s") for name in names}
    print(f"{arguments.shape}, {arguments.threads} thread(s), page cache warm; ms")
    print(f"{'part':14} {'best':>8} {'median':>8}")
    for name, times in parts.items():
        print(f"{name:14} {1e3 * times['best_s']:8.1f} {1e3 * times['median_s']:8.1f}")
    print(f"goal: {1e3 * GOAL_S:.0f} ms in all")
    memory = runs[-1]["memory"]
    print("resident after opening: " + ", ".join(f"{name} {size / 1e6:.0f} MB" for name, size in memory.items()))
    finish(
        {
            "benchmark": "load",
            "shape": arguments.shape,
            "threads": arguments.threads,
            "file_bytes": model.size_bytes,
            "runs": arguments.runs,
            "goal_s": GOAL_S,
            "parts": parts,
            "memory_bytes": memory,
        },
        arguments.json,
    )


def run(path: Path, threads: int) -> dict[str, Any]:
    """Start Python, load the model and make one token; the seconds of each part."""
    start = time.time()
    output = subprocess.run(
        [sys.executable, "-c", _CHILD, str(path), str(threads)],
        check=True,
        capture_output=True,
        text=True,
        env=dict(os.environ),
    ).stdout
    found: dict[str, Any] = json.loads(output)
    parts, before = {}, start
    for name, mark in found.pop("marks").items():
        parts[name], before = mark - before, mark
    return {**found, "parts": parts, "total": before - start}


if __name__ == "__main__":
    main()
