"""Perplexity: how well a model predicts the tokens of a text."""

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Float32 = NDArray[np.float32]
Float64 = NDArray[np.float64]

# Logits are widened to float64 in pieces that fit the L2 cache, not a whole window at once.
_PIECE_ELEMENTS = 1 << 16


@dataclass(frozen=True)
class Perplexity:
    """How well a model predicts a text.

    Attributes:
        nats_per_token: mean of -ln p(token) over the predictions.
        standard_error: of nats_per_token, from the spread between windows; `None` for a single window.
        perplexity: exp(nats_per_token).
        bits_per_byte: nats_per_token / ln 2 * text_tokens / text_bytes.
        windows, predictions: how many were evaluated.
        text_tokens, text_bytes: size of the whole text.
    """

    nats_per_token: float
    standard_error: float | None
    perplexity: float
    bits_per_byte: float
    windows: int
    predictions: int
    text_tokens: int
    text_bytes: int

    def to_json(self) -> dict[str, Any]:
        """Return the attributes as a JSON object."""
        return asdict(self)


def summarize_losses(losses: Float64, text_tokens: int, text_bytes: int) -> Perplexity:
    """Reduce the losses of all windows.

    Args:
        losses: nats, shape (windows, predictions per window).
        text_tokens, text_bytes: size of the whole text.
    """
    nats = float(losses.mean())
    return Perplexity(
        nats_per_token=nats,
        standard_error=standard_error(losses),
        perplexity=math.exp(nats) if nats < 700 else math.inf,
        bits_per_byte=nats / math.log(2) * text_tokens / text_bytes,
        windows=len(losses),
        predictions=losses.size,
        text_tokens=text_tokens,
        text_bytes=text_bytes,
    )


def standard_error(values: Float64) -> float | None:
    """Standard error of the mean of values, shape (windows, n), taking windows but not their tokens as independent."""
    if len(values) < 2:
        return None
    return float(values.mean(axis=1).std(ddof=1) / math.sqrt(len(values)))


def token_losses(logits: Float32, targets: NDArray[np.int64]) -> Float64:
    """Return -ln softmax(logits)[target] in nats.

    Args:
        logits: float32, shape (n, vocabulary).
        targets: int64, shape (n,).
    Returns:
        float64, shape (n,).
    """
    losses = np.empty(len(targets))
    for rows in pieces(logits):
        log_probabilities = log_softmax(logits[rows])
        losses[rows] = -log_probabilities[np.arange(len(log_probabilities)), targets[rows]]
    return losses


def pieces(logits: Float32) -> Iterator[slice]:
    """Yield slices of rows that cover `logits`, each small enough to fit the cache in float64."""
    step = max(1, _PIECE_ELEMENTS // logits.shape[1])
    for start in range(0, len(logits), step):
        yield slice(start, min(start + step, len(logits)))


def log_softmax(logits: Float32) -> Float64:
    """Return log softmax over the last axis, in float64."""
    shifted = logits.astype(np.float64)
    shifted -= shifted.max(axis=1, keepdims=True)
    shifted -= np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return shifted
