"""Keeps the C library from holding memory that was freed."""

from __future__ import annotations

import asyncio
import ctypes
import sys
from collections.abc import Callable

_LOOK_S = 0.5
_MOST_BUSY_S = 60.0
_MALLOC_ARENA_MAX = -8  # of <malloc.h>
_ARENAS = 2


def limit_arenas() -> None:
    """Let threads share two arenas; call it before they start.

    By default the C library gives them up to eight for each processor, and the holes in each are lost to the others.
    Every grammar is compiled in a thread of its own, so all arenas would come into use.
    """
    mallopt = _function("mallopt")
    if mallopt is not None:
        mallopt(_MALLOC_ARENA_MAX, _ARENAS)


async def keep_trimming(done: Callable[[], int], is_idle: Callable[[], bool]) -> None:
    """Trim the heap until this is cancelled: when work has ended, and once a minute while it goes on.

    Requests are handled by several threads, and the C library keeps what each of them freed. Long prompts and big
    bodies would otherwise leave their mark until the process ends.

    Args:
        done: a count that grows with work.
        is_idle: whether there is nothing to do.
    """
    trim = _function("malloc_trim")
    if trim is None:
        return
    trimmed, since_s = done(), 0.0
    while True:
        await asyncio.sleep(_LOOK_S)
        since_s += _LOOK_S
        if done() != trimmed and (is_idle() or since_s >= _MOST_BUSY_S):
            trimmed, since_s = done(), 0.0
            await asyncio.to_thread(trim, 0)


def _function(name: str) -> Callable[..., object] | None:
    """A function of the C library; `None` if it has none of that name, since it keeps nothing."""
    if not sys.platform.startswith("linux"):
        return None
    found: Callable[..., object] | None = getattr(ctypes.CDLL(None), name, None)
    return found
