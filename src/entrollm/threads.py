"""How many threads to use."""

from __future__ import annotations

import operator
import os
from collections.abc import Set
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from entrollm import _core

MAX_THREADS = 1024
"""More threads than any machine has processors that share a model's products."""


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


def start_pool(threads: int | None = None, spin_us: int = 200) -> _core.ThreadPool:
    """Start the threads of the native kernels.

    Args:
        threads: 1 to `MAX_THREADS`; `None` for one per performance core.
        spin_us: microseconds that they stay awake between products.
    Raises:
        ValueError: `threads` is out of range, the system does not allow so many, or the environment variable
            ENTROLLM_ISA names an instruction set that there is not.
    """
    from entrollm import _core

    _core.isa()  # raises here, where nothing else is wrong, if ENTROLLM_ISA is
    count = default_threads() if threads is None else check_threads(threads)
    try:
        return _core.ThreadPool(count, spin_us)
    except RuntimeError as error:
        raise ValueError(f"the system does not let this process start {count} threads ({error}); use fewer") from None


def check_threads(threads: int) -> int:
    """Check a number of threads.

    Raises:
        ValueError: it is not from 1 to `MAX_THREADS`.
        TypeError: it is not an integer.
    """
    count = operator.index(threads)
    if count < 1:
        raise ValueError(f"threads must be at least 1, found {count}")
    if count > MAX_THREADS:
        raise ValueError(f"threads must be at most {MAX_THREADS}, found {count}")
    return count


def spin_us() -> int:
    """Microseconds that worker threads stay awake between products: ENTROLLM_SPIN_US, or 200.

    Raises:
        ValueError: the variable is not an integer from 0 to 1000000.
    """
    text = os.environ.get("ENTROLLM_SPIN_US", "200")
    if not text.isdecimal() or len(text) > 7 or int(text) > 1_000_000:
        raise ValueError(f"ENTROLLM_SPIN_US should be an integer from 0 to 1000000 (microseconds), found {text!r:.80}")
    return int(text)
