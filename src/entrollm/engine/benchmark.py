"""How fast a compressed model runs on this machine, in each form that its weights can have in memory."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from entrollm.engine.generate import GenerationResult
from entrollm.engine.load import load
from entrollm.engine.memory import Memory
from entrollm.engine.model import Model

# Tokens before those that are timed one by one.
_START = 8


@dataclass(frozen=True, slots=True)
class ModelSpeed:
    """A model with one choice of memory. Rates are tokens per second, one for each round.

    Attributes:
        memory: the choice, as `load` takes it.
        first_token_s: from opening the folder to the first token of a short prompt.
        prompt_rates: of a long prompt.
        token_rates: of tokens one after the other, after a short prompt.
    """

    memory: Memory
    first_token_s: float
    prompt_rates: tuple[float, ...]
    token_rates: tuple[float, ...]

    @property
    def prompt_rate(self) -> float:
        """The median of prompt_rates."""
        return statistics.median(self.prompt_rates)

    @property
    def token_rate(self) -> float:
        """The median of token_rates."""
        return statistics.median(self.token_rates)


def measure_speeds(
    folder: str | Path, memories: Sequence[Memory], threads: int | None, *, prompt: int, tokens: int, rounds: int
) -> list[ModelSpeed]:
    """Time a model with each choice of memory in turns, so that a disturbance meets all of them.

    Args:
        folder: made by `compress`.
        memories: the choices.
        threads: as for `load`.
        prompt: tokens of the long prompt.
        tokens: how many to make one after the other, 2 at least.
        rounds: how often to time each choice.
    Raises:
        FormatError, UnsupportedError: the folder cannot be run.
        ValueError: the prompt does not fit the model's context, or the model ends each of its texts at once.
    """
    if tokens < 2:
        raise ValueError(f"tokens must be 2 or more, since the first one belongs to the prompt; found {tokens}")
    opened = []
    for memory in memories:
        begin = time.perf_counter()
        model = load(folder, threads=threads, memory=memory)
        _generate(model, _START, 1, seed=0)
        opened.append((memory, model, time.perf_counter() - begin))
    prompt_rates: list[list[float]] = [[] for _ in opened]
    token_rates: list[list[float]] = [[] for _ in opened]
    for seed in range(rounds):
        for place, (_, model, _) in enumerate(opened):
            prompt_rates[place].append(prompt / _generate(model, prompt, 1, seed).prefill_s)
            answer = _generate(model, _START, tokens, seed)
            if len(answer.token_ids) > 1:
                token_rates[place].append(answer.tokens_per_second)
    if not all(token_rates):
        raise ValueError(f"{folder}: the model ends each of its texts at once, so that there is nothing to time")
    return [
        ModelSpeed(memory, seconds, tuple(prompts), tuple(rates))
        for (memory, _, seconds), prompts, rates in zip(opened, prompt_rates, token_rates, strict=True)
    ]


def _generate(model: Model, prompt: int, tokens: int, seed: int) -> GenerationResult:
    """The answer of at most `tokens` greedy tokens to a prompt of random ones."""
    ids = np.random.default_rng(seed).integers(0, model.config.vocab_size, prompt).tolist()
    return model.generate(ids, max_tokens=tokens, temperature=0.0)
