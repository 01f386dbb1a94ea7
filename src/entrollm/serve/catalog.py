"""The models of a server: which there are, and which are loaded."""

from __future__ import annotations

import asyncio
import gc
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from entrollm.errors import EntroLLMError
from entrollm.serve.errors import ApiError, bad_request
from entrollm.serve.served import ServedModel

_LOG = logging.getLogger(__name__)
_LEAST_WAIT_S, _MOST_WAIT_S = 0.05, 10.0


@dataclass
class Entry:
    """A model that is loaded when a request first names it.

    Attributes:
        name: what requests call it.
        context_length: tokens of prompt and answer together.
        has_chat_template: whether it can answer dialogues.
        load: loads it; called in a thread.
        served: the loaded model.
        last_use_s: time.monotonic() of the last request.
    """

    name: str
    context_length: int
    has_chat_template: bool
    load: Callable[[], ServedModel]
    served: ServedModel | None = None
    last_use_s: float = field(default_factory=time.monotonic)
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)


class Catalog:
    """Models by their names.

    Args:
        entries: at least one, with different names.
        idle_release_s: seconds without a request after which a model is released; `None` to keep all.
    """

    def __init__(self, entries: Sequence[Entry], idle_release_s: float | None = None) -> None:
        self._entries = {entry.name: entry for entry in entries}
        self._idle_release_s = idle_release_s

    @property
    def entries(self) -> list[Entry]:
        """All models, in the order in which they were given."""
        return list(self._entries.values())

    def find(self, name: str | None) -> Entry:
        """The entry of a model; `None` names the only one.

        Raises:
            ApiError: there is no such model, or none is named and there are several.
        """
        if name is None and len(self._entries) == 1:
            return next(iter(self._entries.values()))
        if name is None:
            raise bad_request(f"name one of the models: {', '.join(self._entries)}", "model")
        if name not in self._entries:
            message = f"there is no model {name[:80]!r} here, only {', '.join(self._entries)}"
            raise ApiError(404, message, param="model", code="model_not_found")
        return self._entries[name]

    async def get(self, name: str | None) -> ServedModel:
        """The model, which is loaded if it is not.

        Raises:
            ApiError: as find, or the model does not load.
        """
        entry = self.find(name)
        entry.last_use_s = time.monotonic()
        async with entry.lock:
            if entry.served is None:
                try:
                    entry.served = await asyncio.to_thread(entry.load)
                except (EntroLLMError, OSError, ValueError, RuntimeError, MemoryError) as error:
                    # RuntimeError: what torch raises where a GPU's memory does not suffice.
                    _LOG.exception("%s does not load", entry.name)
                    raise ApiError(503, f"{entry.name} does not load: {error}", code="model_not_loaded") from None
            entry.last_use_s = time.monotonic()
            return entry.served

    def release_idle(self, is_running: Callable[[ServedModel], bool]) -> list[str]:
        """Release the models that had nothing to do for long enough, and return their names.

        A request that has its model already keeps it until it ends.

        Args:
            is_running: whether an answer of the model waits or runs.
        """
        released = []
        now = time.monotonic()
        for entry in self._entries.values():
            if entry.served is None or self._idle_release_s is None or entry.lock.locked():
                continue
            if is_running(entry.served):
                entry.last_use_s = now
            elif now - entry.last_use_s >= self._idle_release_s:
                entry.served = None
                released.append(entry.name)
        return released

    async def keep_releasing(self, is_running: Callable[[ServedModel], bool]) -> None:
        """Release idle models until this is cancelled."""
        if self._idle_release_s is None:
            return
        wait_s = min(_MOST_WAIT_S, max(_LEAST_WAIT_S, self._idle_release_s / 4))
        while True:
            await asyncio.sleep(wait_s)
            if self.release_idle(is_running):
                await asyncio.to_thread(gc.collect)
