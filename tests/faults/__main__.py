"""A campaign from the command line."""

from __future__ import annotations

import argparse
import math
import os
import sys
import tempfile
from pathlib import Path

from tests.faults.campaign import ACTIONS, environment, run
from tests.kills.campaign import MODES


def main() -> int:
    """Disturb runs of each mode at each call that changes the disk; the exit code is 1 if anything was wrong."""
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=main.__doc__)
    parser.add_argument("modes", nargs="*", metavar="MODE", help=f"by default all: {', '.join(MODES)}")
    parser.add_argument("--actions", nargs="+", choices=ACTIONS, default=list(ACTIONS))
    parser.add_argument("--stride", type=int, default=1, help="disturb every n-th call only")
    parser.add_argument("--first", type=int, default=0, help="the first call to disturb")
    parser.add_argument("--seconds", type=float, default=math.inf, help="for each mode, at most")
    options = parser.parse_args()
    if "LD_PRELOAD" not in os.environ:
        with tempfile.TemporaryDirectory(prefix="entrollm-shim-") as folder:
            process = os.spawnve(
                os.P_WAIT,
                sys.executable,
                [sys.executable, "-m", "tests.faults", *sys.argv[1:]],
                environment(Path(folder) / "shim.so"),
            )
        return process
    is_wrong = False
    for name in options.modes or MODES:
        outcome = run(
            name,
            actions=tuple(options.actions),
            stride=options.stride,
            first=options.first,
            seconds=options.seconds,
        )
        is_wrong = is_wrong or bool(outcome.faults)
        print(f"{name}: {outcome.runs} runs disturbed, {outcome.steps} calls in each, then {dict(outcome.states)}")
        if outcome.next_step < outcome.steps:
            print(f"  the time is over; go on with --first {outcome.next_step}")
        for fault, count in sorted(outcome.faults.items()):
            print(f"  {count} times: {fault}")
        sys.stdout.flush()
    return int(is_wrong)


if __name__ == "__main__":
    sys.exit(main())
