"""KL divergence: how far a model's predictions are from a reference model's."""

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from entrollm.evaluate.perplexity import Float32, Float64, log_softmax, pieces, standard_error


@dataclass(frozen=True)
class Divergence:
    """KL(reference || model) over the predictions of a text, in nats.

    Attributes:
        mean, percentile_99, maximum: over the predictions.
        standard_error: of the mean, from the spread between windows; `None` for a single window.
        top1_agreement: share of the predictions with the same likeliest token.
    """

    mean: float
    standard_error: float | None
    percentile_99: float
    maximum: float
    top1_agreement: float

    def to_json(self) -> dict[str, Any]:
        """Return the attributes as a JSON object."""
        return asdict(self)


def summarize_divergences(divergences: Float64, agreements: NDArray[np.bool_]) -> Divergence:
    """Reduce the divergences and top-1 agreements of all windows, both of shape (windows, predictions per window)."""
    return Divergence(
        mean=float(divergences.mean()),
        standard_error=standard_error(divergences),
        percentile_99=float(np.percentile(divergences, 99)),
        maximum=float(divergences.max()),
        top1_agreement=float(agreements.mean()),
    )


def token_divergences(reference: Float32, model: Float32) -> Float64:
    """Return KL(softmax(reference) || softmax(model)) of every row.

    Args:
        reference, model: logits, float32, shape (n, vocabulary).
    Returns:
        nats, float64, shape (n,); values that rounding takes below 0 are set to 0.
    """
    divergences = np.empty(len(reference))
    for rows in pieces(reference):
        wanted, found = log_softmax(reference[rows]), log_softmax(model[rows])
        divergences[rows] = (np.exp(wanted) * (wanted - found)).sum(axis=1)
    return np.maximum(divergences, 0.0)


def top1_agreements(reference: Float32, model: Float32) -> NDArray[np.bool_]:
    """Return for each row whether both logits have their maximum at the same token."""
    same: NDArray[np.bool_] = reference.argmax(axis=1) == model.argmax(axis=1)
    return same
