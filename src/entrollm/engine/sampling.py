"""Choosing the next token from the logits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import copy, deepcopy
from dataclasses import dataclass, field
from numbers import Integral, Real

import numpy as np
from numpy.typing import ArrayLike, NDArray

from entrollm.engine.processors import History, LogitsProcessor, Penalties, RepetitionPenalty, TokenBias
from entrollm.engine.weights import Floats, Ids
from entrollm.errors import FormatError


@dataclass(frozen=True)
class SamplingOptions:
    """How the next token is chosen; the filters apply in the order of the fields.

    Attributes:
        repetition_penalty: above 1 makes tokens of the prompt and the answer less likely; 1 is off.
        temperature: 0 takes the likeliest token; the filters below then change nothing.
        top_k: keep the k likeliest tokens; 0 is off.
        top_p: keep the likeliest tokens that together reach this probability; 1 is off.
        min_p: drop tokens below this share of the likeliest one's probability; 0 is off.
        seed: makes the choice reproducible; None draws a fresh one.
        presence_penalty: subtracted from the logits of tokens that the answer holds; 0 is off. It and the next two
            come after the repetition penalty and before the temperature.
        frequency_penalty: subtracted as often as the answer holds a token; 0 is off.
        logit_bias: added to the logits of these token ids.
    Raises:
        TypeError: a value is not a number, or top_k, seed or a token id not an integer.
        ValueError: a value is out of range.
    """

    repetition_penalty: float = 1.0
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, low, high in (
            ("repetition_penalty", 0.01, 100.0),
            ("temperature", 0.0, 100.0),
            ("top_k", 0, 2**31),
            ("top_p", 0.0, 1.0),
            ("min_p", 0.0, 1.0),
            ("presence_penalty", -100.0, 100.0),
            ("frequency_penalty", -100.0, 100.0),
        ):
            value = getattr(self, name)
            check_number(name, value, is_integer=name == "top_k")
            if not low <= value <= high:  # also refuses NaN
                raise ValueError(f"{name} should be from {low:g} to {high:g}, got {value}")
        if 0 < self.temperature < 1e-3:
            raise ValueError(f"temperature should be 0 or at least 0.001, got {self.temperature}")
        if not isinstance(self.logit_bias, Mapping):
            raise TypeError(f"logit_bias should map token ids to numbers, got {self.logit_bias!r:.80}")
        for token, bias in self.logit_bias.items():
            check_number("a token id of logit_bias", token, is_integer=True)
            check_number(f"logit_bias of token {token}", bias, is_integer=False)
            if not (token >= 0 and -1000.0 <= bias <= 1000.0):
                raise ValueError(f"logit_bias should map token ids to numbers from -1000 to 1000, got {token}: {bias}")
        if self.seed is None:
            return
        check_number("seed", self.seed, is_integer=True)
        if self.seed < 0:
            raise ValueError(f"seed should be at least 0, got {self.seed}")


def check_number(name: str, value: object, *, is_integer: bool) -> None:
    """Check an option of a caller.

    Raises:
        TypeError: it is not a number, or not an integer where it must be one; true and false are neither.
    """
    kind: type = Integral if is_integer else Real
    if isinstance(value, bool) or not isinstance(value, kind):
        raise TypeError(f"{name} should be {'an integer' if is_integer else 'a number'}, got {value!r}")


class Sampler:
    """Chooses tokens one after another, remembering them for the penalties.

    Args:
        options: how to choose.
        vocab_size: logits per call.
        prompt_ids: tokens of the prompt, which count for the repetition penalty alone.
    Raises:
        ValueError: logit_bias names a token outside the vocabulary.
    """

    def __init__(self, options: SamplingOptions, vocab_size: int, prompt_ids: Sequence[int]) -> None:
        self._options = options
        self._random = np.random.default_rng(options.seed)
        self._history = History(vocab_size, prompt_ids)
        self._processors = processors_of(options, vocab_size)

    def copy(self) -> Sampler:
        """One that chooses the same tokens from the same logits, with a state of its own."""
        twin = copy(self)
        twin._random = deepcopy(self._random)
        twin._history = self._history.copy()
        return twin

    def __call__(self, logits: Floats, *, banned: Sequence[int] = (), allowed: NDArray[np.bool_] | None = None) -> int:
        """Choose a token id from float32 (vocab_size,).

        Args:
            logits: float32 (vocab_size,).
            banned: token ids that are not to be chosen; those outside the vocabulary are none.
            allowed: bool (vocab_size,): the only tokens that may be chosen; `None` for all.
        Raises:
            FormatError: the logits hold NaN or +inf, so the weights are broken.
            ValueError: no token is left to choose from.
        """
        top = int(np.argmax(logits))  # the first NaN, if there is one
        check_finite(logits[top], "logits")
        if self._processors or banned or allowed is not None:
            logits = logits.copy()
            for process in self._processors:
                process(logits, self._history)
            logits[[token for token in banned if token < len(logits)]] = -np.inf
            if allowed is not None:
                logits[~allowed] = -np.inf
            top = int(np.argmax(logits))
            if not np.isfinite(logits[top]):
                raise ValueError("no token is allowed here; allow at least one")
        if self._options.temperature == 0.0:
            token = top
        else:
            ids, probabilities = candidates(logits, self._options)
            position = int(np.searchsorted(np.cumsum(probabilities), self._random.random(), side="right"))
            token = int(ids[min(position, len(ids) - 1)])
        self._history.add(token)
        return token


def processors_of(options: SamplingOptions, vocab_size: int) -> list[LogitsProcessor]:
    """What changes the logits before the temperature, in its order; nothing for options that are off.

    Raises:
        ValueError: logit_bias names a token outside the vocabulary.
    """
    chain: list[LogitsProcessor] = []
    if options.repetition_penalty != 1.0:
        chain.append(RepetitionPenalty(options.repetition_penalty))
    if options.presence_penalty or options.frequency_penalty:
        chain.append(Penalties(options.presence_penalty, options.frequency_penalty))
    if options.logit_bias:
        chain.append(TokenBias(options.logit_bias, vocab_size))
    return chain


def candidates(logits: Floats, options: SamplingOptions) -> tuple[Ids, NDArray[np.float64]]:
    """The tokens that survive temperature, top_k, top_p and min_p.

    Args:
        logits: float32 (vocab_size,); options.temperature above 0.
        options: how to choose; the repetition penalty is not applied here.
    Returns:
        (ids, probabilities), likeliest first, at least one; the probabilities sum to 1.
    """
    ids = _likeliest(logits, options.top_k) if 0 < options.top_k < len(logits) else None
    chosen = logits if ids is None else logits[ids]
    # float32, since a vocabulary in float64 would take milliseconds.
    weights = np.exp((chosen - chosen.max()) / np.float32(options.temperature))
    total = weights.sum(dtype=np.float64)
    if options.top_p >= 1.0 and options.min_p <= 0.0:
        return np.arange(len(logits)) if ids is None else ids, weights.astype(np.float64) / total
    # Only likely tokens can survive, and sorting few is fast: all tokens below (1 - top_p) / n together have less than
    # 1 - top_p. The factor covers rounding. The largest weight is 1.
    floor = 0.99 * max((1.0 - options.top_p) * total / len(weights), options.min_p)
    likely = np.flatnonzero(weights >= np.float32(floor))
    likely = likely[np.argsort(chosen[likely], kind="stable")[::-1]]
    probabilities = weights[likely].astype(np.float64) / total
    kept = len(likely)
    if options.top_p < 1.0:
        before = np.cumsum(probabilities) - probabilities
        kept = max(1, int(np.count_nonzero(before < options.top_p)))
    if options.min_p > 0.0:
        kept = min(kept, int(np.count_nonzero(probabilities >= options.min_p * probabilities[0])))
    probabilities = probabilities[:kept]
    likely = likely[:kept]
    return likely if ids is None else ids[likely], probabilities / probabilities.sum()


def _likeliest(logits: Floats, count: int) -> Ids:
    """The ids of the `count` largest logits and of those that tie with the last of them, in the order of the ids."""
    least = np.partition(logits, len(logits) - count)[-count]
    return np.flatnonzero(logits >= least)


@dataclass(frozen=True)
class TokenLogprobs:
    """How likely the model found a token, before any penalty, bias or temperature.

    Attributes:
        token: the token's id.
        logprob: natural logarithm of its probability.
        top: the likeliest tokens with theirs, likeliest first.
    """

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...]


def check_finite(numbers: ArrayLike, what: str) -> None:
    """Check numbers that a model has made.

    Args:
        numbers: floats.
        what: their name, such as "logits".
    Raises:
        FormatError: one is not finite.
    """
    if not np.isfinite(numbers).all():
        raise FormatError(f"the model's {what} are not finite: its weights hold NaN, infinite or absurd values")


def token_logprobs(logits: Floats, token: int, count: int) -> TokenLogprobs:
    """Log-probabilities of a token and of the likeliest ones.

    Args:
        logits: float32 (vocab_size,), as the model made them.
        token: its id.
        count: how many of the likeliest to list, at least 0.
    """
    largest = logits.max()
    log_total = float(largest) + float(np.log(np.exp(logits - largest).sum(dtype=np.float64)))
    count = min(count, len(logits))
    top: Ids = np.empty(0, dtype=np.int64)
    if count:
        top = _likeliest(logits, count)
        top = top[np.argsort(-logits[top], kind="stable")][:count]
    return TokenLogprobs(
        token, float(logits[token]) - log_total, tuple((int(i), float(logits[i]) - log_total) for i in top)
    )
