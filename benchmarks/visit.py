"""One timing of an open model: some tokens after a short prompt, and perhaps a long prompt."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from common import OtherLoad, wait_for_idle

SHORT, LONG = 8, 512


class Generator(Protocol):
    """A model that continues a prompt greedily."""

    def generate(self, prompt: list[int], count: int, /) -> tuple[float, float, list[int]]:
        """Seconds for the prompt, seconds for all tokens after the first, the tokens."""


@dataclass(frozen=True)
class Visit:
    """What one visit found.

    Attributes:
        rate: tokens per second after the prompt.
        prompt_rate: tokens per second of a long prompt, where it was asked for.
        others: the share of the machine that other processes took.
        tokens: what was generated.
    """

    rate: float
    prompt_rate: float | None
    others: float
    tokens: list[int]


def visit_model(model: Generator, count: int, long: bool) -> Visit:
    """Warm up, wait for the machine to be idle, and time.

    Args:
        model: an open model.
        count: tokens to make.
        long: whether to time a prompt of LONG tokens.
    """
    prompt = list(range(2, 2 + SHORT))
    model.generate(prompt, 4)
    wait_for_idle()
    load = OtherLoad()
    _, seconds, tokens = model.generate(prompt, count)
    others = load.share()
    prompt_rate = LONG / model.generate([2 + i % 200 for i in range(LONG)], 1)[0] if long else None
    return Visit((count - 1) / seconds, prompt_rate, others, tokens)
