"""The caches of a model's running sequences, kept afterwards for prompts that begin alike."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from entrollm.engine.batch import SequenceCache
from entrollm.engine.text_model import TextModel


@dataclass
class Slot:
    """Room for one running sequence.

    Attributes:
        cache: of the sequence that runs, or of the last one.
        is_busy: whether a sequence runs.
        last_use: a number that grows with each use.
        aside: the cache of the last sequence, while a prompt runs that is only read.
    """

    cache: SequenceCache
    is_busy: bool = False
    last_use: int = 0
    aside: SequenceCache | None = None


class Slots:
    """All slots of a model.

    Args:
        model: makes the caches.
        count: sequences that can run at a time.
    """

    def __init__(self, model: TextModel, count: int) -> None:
        self._model = model
        self._slots = [Slot(model.new_cache()) for _ in range(count)]
        self._uses = 0

    @property
    def busy(self) -> int:
        """Sequences that run."""
        return sum(slot.is_busy for slot in self._slots)

    @property
    def has_room(self) -> bool:
        """Whether another sequence can run."""
        return any(not slot.is_busy for slot in self._slots)

    def take(self, prompt: Sequence[int]) -> tuple[Slot, int]:
        """Occupy a slot for a prompt, with the longest beginning that any slot has computed already.

        Args:
            prompt: token ids, at least one; has_room must hold.
        Returns:
            The slot, and how many tokens of the prompt its cache holds; less than all.
        """
        shared, source = max(
            ((slot.cache.shared(prompt), slot) for slot in self._slots), key=lambda pair: (pair[0], not pair[1].is_busy)
        )
        # A cache that would lose most of what it holds stays as it is, unless no other slot is idle.
        slot = source
        if source.is_busy or 2 * shared < source.cache.length:
            slot = min((slot for slot in self._slots if not slot.is_busy), key=lambda slot: slot.last_use)
        if slot is source or not shared:
            shared = slot.cache.reuse(prompt)
        else:
            slot.cache = source.cache.fork(shared)
        slot.is_busy = True
        self._touch(slot)
        return slot, shared

    def take_empty(self) -> Slot:
        """Occupy the least recently used slot with an empty cache, beside its own; has_room must hold."""
        slot = min((slot for slot in self._slots if not slot.is_busy), key=lambda slot: slot.last_use)
        slot.aside, slot.cache = slot.cache, self._model.new_cache()
        slot.is_busy = True
        return slot

    def give_back(self, slot: Slot, *, keep: bool = True) -> None:
        """Free a slot.

        Args:
            slot: a busy one.
            keep: whether its cache may serve a later prompt. Without it the slot has its former cache again, if that
                was put aside, or an empty one.
        """
        slot.is_busy = False
        aside, slot.aside = slot.aside, None
        if keep:
            self._touch(slot)
        else:
            slot.cache = self._model.new_cache() if aside is None else aside

    def _touch(self, slot: Slot) -> None:
        self._uses += 1
        slot.last_use = self._uses
