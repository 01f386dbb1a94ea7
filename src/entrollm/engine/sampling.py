"""Choosing the next token from the logits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral, Real

import numpy as np
from numpy.typing import NDArray

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
    Raises:
        TypeError: a value is not a number, or top_k or seed not an integer.
        ValueError: a value is out of range.
    """

    repetition_penalty: float = 1.0
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int | None = None

    def __post_init__(self) -> None:
        for name, low, high in (
            ("repetition_penalty", 0.01, 100.0),
            ("temperature", 0.0, 100.0),
            ("top_k", 0, 2**31),
            ("top_p", 0.0, 1.0),
            ("min_p", 0.0, 1.0),
        ):
            value = getattr(self, name)
            check_number(name, value, is_integer=name == "top_k")
            if not low <= value <= high:  # also refuses NaN
                raise ValueError(f"{name} should be from {low:g} to {high:g}, got {value}")
        if 0 < self.temperature < 1e-3:
            raise ValueError(f"temperature should be 0 or at least 0.001, got {self.temperature}")
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
    """Chooses tokens one after another, remembering them for the repetition penalty.

    Args:
        options: how to choose.
        vocab_size: logits per call.
        prompt_ids: tokens that count as already used.
    """

    def __init__(self, options: SamplingOptions, vocab_size: int, prompt_ids: Sequence[int]) -> None:
        self._options = options
        self._random = np.random.default_rng(options.seed)
        self._used = np.zeros(vocab_size, dtype=np.bool_)
        self._used[np.asarray(prompt_ids, dtype=np.int64)] = True

    def __call__(self, logits: Floats, *, banned: Sequence[int] = ()) -> int:
        """Choose a token id from float32 (vocab_size,).

        Args:
            logits: float32 (vocab_size,).
            banned: token ids that are not to be chosen; those outside the vocabulary are none.
        Raises:
            FormatError: the logits hold NaN or +inf, so the weights are broken.
        """
        penalty = self._options.repetition_penalty
        if penalty != 1.0:
            logits = _penalised(logits, self._used, penalty)
        if banned:
            logits = logits.copy()
            logits[[token for token in banned if token < len(logits)]] = -np.inf
        top = int(np.argmax(logits))  # the first NaN, if there is one
        if not np.isfinite(logits[top]):
            raise FormatError("the model's logits are not finite: its weights hold NaN, infinite or absurd values")
        if self._options.temperature == 0.0:
            token = top
        else:
            ids, probabilities = candidates(logits, self._options)
            position = int(np.searchsorted(np.cumsum(probabilities), self._random.random(), side="right"))
            token = int(ids[min(position, len(ids) - 1)])
        self._used[token] = True
        return token


def candidates(logits: Floats, options: SamplingOptions) -> tuple[Ids, NDArray[np.float64]]:
    """The tokens that survive temperature, top_k, top_p and min_p.

    Args:
        logits: float32 (vocab_size,); options.temperature above 0.
        options: how to choose; the repetition penalty is not applied here.
    Returns:
        (ids, probabilities), likeliest first, at least one; the probabilities sum to 1.
    """
    ids = np.arange(len(logits))
    if 0 < options.top_k < len(logits):
        kth = np.partition(logits, -options.top_k)[-options.top_k]
        ids = np.flatnonzero(logits >= kth)  # ties with the k-th stay
    if options.top_p < 1.0 or options.min_p > 0.0:
        ids = ids[np.argsort(logits[ids], kind="stable")[::-1]]
    scores = logits[ids].astype(np.float64) / options.temperature
    probabilities = np.exp(scores - scores.max())
    probabilities /= probabilities.sum()
    kept = len(ids)
    if options.top_p < 1.0:
        before = np.cumsum(probabilities) - probabilities
        kept = max(1, int(np.count_nonzero(before < options.top_p)))
    if options.min_p > 0.0:
        kept = min(kept, int(np.count_nonzero(probabilities >= options.min_p * probabilities[0])))
    probabilities = probabilities[:kept]
    return ids[:kept], probabilities / probabilities.sum()


def _penalised(logits: Floats, used: NDArray[np.bool_], penalty: float) -> Floats:
    logits = logits.copy()
    scores = logits[used]
    logits[used] = np.where(scores < 0, scores * np.float32(penalty), scores / np.float32(penalty))
    return logits
