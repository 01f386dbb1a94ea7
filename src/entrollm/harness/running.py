"""Answers that are generated side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from entrollm.engine.answer import AnswerText
from entrollm.engine.batch import SequenceStep
from entrollm.engine.cache import Cache
from entrollm.engine.model import Model
from entrollm.engine.weights import Floats, Ids


class Running:
    """One answer in the making.

    Attributes:
        cache: its tokens so far, but for the last one.
        text: what is complete of the answer.
    """

    def __init__(self, answer: AnswerText, cache: Cache) -> None:
        self.cache = cache
        self.text = ""
        self._answer = answer
        self._token = 0

    @property
    def has_ended(self) -> bool:
        """Whether nothing comes any more."""
        return self._answer.finish_reason != "unfinished"

    @property
    def next_ids(self) -> Ids:
        """int64 (1,): the token to run the model on."""
        return np.array([self._token], dtype=np.int64)

    def push(self, logits: Floats) -> None:
        """Choose the next token: float32 (vocab_size,)."""
        self._token, text = self._answer.push(logits)
        self.text += text


def start(model: Model, ids: Sequence[int], options: Mapping[str, Any], others: Sequence[Running]) -> Running:
    """Read a prompt and choose the first token of its answer.

    Args:
        model: the model.
        ids: the prompt, at least one token.
        options: as for Model.generate.
        others: answers whose prompts may begin as this one does.
    """
    longest = max(others, key=lambda other: other.cache.shared(ids), default=None)
    shared = 0 if longest is None else longest.cache.shared(ids)
    cache = model.new_cache() if longest is None or shared == 0 else longest.cache.fork(shared)
    running = Running(model.new_answer(ids, continues_text=True, **options), cache)
    logits = model.step([SequenceStep(np.array(ids[shared:], dtype=np.int64), cache)])
    running.push(logits[0])
    return running
