"""A campaign from the command line."""

from __future__ import annotations

import argparse
import math
import sys

from tests.kills.campaign import MODES, run


def main() -> int:
    """Kill runs of each mode at random moments and print what was found; the exit code is 1 if anything was wrong."""
    parser = argparse.ArgumentParser(prog="python -m tests.kills", description=main.__doc__)
    parser.add_argument("modes", nargs="*", metavar="MODE", help=f"by default all: {', '.join(MODES)}")
    parser.add_argument("--kills", type=int, default=100, help="of each mode")
    parser.add_argument("--seconds", type=float, default=math.inf, help="for each mode, at most")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    options = parser.parse_args()
    is_wrong = False
    for name in options.modes or MODES:
        outcome = run(name, kills=options.kills, seconds=options.seconds, seed=options.seed)
        is_wrong = is_wrong or bool(outcome.faults)
        print(f"{name}: {outcome.kills} kills, then {dict(outcome.states)}; {dict(outcome.faults) or 'no'} faults")
        sys.stdout.flush()
    return int(is_wrong)


if __name__ == "__main__":
    sys.exit(main())
