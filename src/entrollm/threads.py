"""How many threads to use."""

from __future__ import annotations

import os
from collections.abc import Set
from pathlib import Path


def default_threads() -> int:
    """Threads that compute without getting in each other's way: one for each performance core of this process."""
    if not hasattr(os, "sched_getaffinity"):
        return os.cpu_count() or 1
    return len(performance_cores(os.sched_getaffinity(0)))


def performance_cores(cpus: Set[int], system: Path = Path("/sys/devices")) -> set[int]:
    """One logical processor of each physical core, without the slower kind of core where there are two.

    Args:
        cpus: numbers of logical processors, at least one.
        system: where Linux describes them; what it does not tell is taken to be alike.
    """
    fast = _numbers(system / "cpu_core/cpus") & cpus  # of processors by Intel with two kinds of cores
    capacity = {cpu: _capacity(system, cpu) for cpu in fast or cpus}
    fast = {cpu for cpu in capacity if 2 * capacity[cpu] > max(capacity.values())}
    first_of_core: dict[int, int] = {}
    for cpu in sorted(fast):
        siblings = _numbers(system / f"cpu/cpu{cpu}/topology/thread_siblings_list") | {cpu}
        first_of_core.setdefault(min(siblings), cpu)
    return set(first_of_core.values())


def _capacity(system: Path, cpu: int) -> int:
    """How fast a core is among those of the machine, up to 1024; ARM has it."""
    try:
        return int((system / f"cpu/cpu{cpu}/cpu_capacity").read_text())
    except (OSError, ValueError):
        return 1024


def _numbers(path: Path) -> set[int]:
    """The numbers of a list such as 0-3,8; none if there is no such file."""
    try:
        ranges = [part.split("-") for part in path.read_text().strip().split(",") if part]
        return {number for ends in ranges for number in range(int(ends[0]), int(ends[-1]) + 1)}
    except (OSError, ValueError):
        return set()


def spin_us() -> int:
    """Microseconds that worker threads stay awake between products: ENTROLLM_SPIN_US, or 200.

    Raises:
        ValueError: the variable is not an integer from 0 to 1000000.
    """
    text = os.environ.get("ENTROLLM_SPIN_US", "200")
    if not text.isdecimal() or int(text) > 1_000_000:
        raise ValueError(f"ENTROLLM_SPIN_US should be an integer from 0 to 1000000 (microseconds), found {text!r}")
    return int(text)
