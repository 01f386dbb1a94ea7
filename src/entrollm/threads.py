"""How many threads to use."""

from __future__ import annotations

import os


def default_threads() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def spin_us() -> int:
    """Microseconds that worker threads stay awake between products: ENTROLLM_SPIN_US, or 200.

    Raises:
        ValueError: the variable is not an integer from 0 to 1000000.
    """
    text = os.environ.get("ENTROLLM_SPIN_US", "200")
    if not text.isdecimal() or int(text) > 1_000_000:
        raise ValueError(f"ENTROLLM_SPIN_US should be an integer from 0 to 1000000 (microseconds), found {text!r}")
    return int(text)
