"""Gives memory that was freed back to the system."""

from __future__ import annotations

import asyncio
import ctypes
import sys
from collections.abc import Callable

_LOOK_S = 0.5
_MOST_BUSY_S = 60.0


async def keep_trimming(done: Callable[[], int], is_idle: Callable[[], bool]) -> None:
    """Trim the heap until this is cancelled: when work has ended, and once a minute while it goes on.

    Requests are handled by several threads, and the C library keeps what each of them freed. Long prompts and big
    bodies would otherwise leave their mark until the process ends.

    Args:
        done: a count that grows with work.
        is_idle: whether there is nothing to do.
    """
    if not sys.platform.startswith("linux"):
        return
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is None:
        return  # a C library that keeps nothing
    trimmed, since_s = done(), 0.0
    while True:
        await asyncio.sleep(_LOOK_S)
        since_s += _LOOK_S
        if done() != trimmed and (is_idle() or since_s >= _MOST_BUSY_S):
            trimmed, since_s = done(), 0.0
            await asyncio.to_thread(trim, 0)
