"""A campaign from the command line."""

from __future__ import annotations

import argparse
import sys

from tests.fuzz.campaign import run
from tests.fuzz.targets import TARGETS


def main() -> int:
    """Fuzz the targets in turn and print what was found; the exit code is 1 if anything was."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=main.__doc__)
    parser.add_argument("targets", nargs="*", metavar="TARGET", help=f"by default all: {', '.join(TARGETS)}")
    parser.add_argument("--inputs", type=int, default=10**6, help="of each target")
    parser.add_argument("--seconds", type=float, default=60, help="for each target, at most")
    parser.add_argument("--seed", type=int, default=0, help="of the first input; each has the next one")
    options = parser.parse_args()
    found = False
    for name in options.targets or TARGETS:
        outcome = run(name, inputs=options.inputs, seconds=options.seconds, seed=options.seed)
        found = found or bool(outcome.faults)
        print(
            f"{name}: {outcome.inputs} inputs, {outcome.accepted} accepted, slowest {outcome.slowest_s:.2f} s, "
            f"{sum(outcome.faults.values())} faults",
            flush=True,
        )
        for key, count in outcome.faults.most_common():
            number, text = outcome.examples[key]
            print(f"  {count} times, first with --seed {number} --inputs 1:\n{text}")
    return int(found)


if __name__ == "__main__":
    sys.exit(main())
