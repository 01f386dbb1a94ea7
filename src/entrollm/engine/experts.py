"""Experts: feed-forward parts of which each token runs through the few that a router chooses."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from entrollm.engine.feed_forward import FeedForward
from entrollm.engine.projection import Projection
from entrollm.engine.weights import Floats, Ids, Weights
from entrollm.models.config import Experts, Mlp, ModelConfig


class MixedExperts:
    """The experts of one layer. The matrices of an expert are read when a token is routed to it.

    Raises:
        FormatError: a tensor is missing or has another shape.
    """

    def __init__(self, config: ModelConfig, weights: Weights, prefix: str, experts: Experts) -> None:
        self._used = experts.used
        self._normalises = experts.normalises
        hidden = config.hidden_size
        self._router = Projection(weights, {prefix + experts.router: experts.count}, hidden, False)
        self._experts = [
            FeedForward(config, weights, prefix, _numbered(experts.expert, number)) for number in range(experts.count)
        ]
        self._shared: FeedForward | None = None
        if experts.shared is not None:
            self._shared = FeedForward(config, weights, prefix, experts.shared)
            self._shared_gate = Projection(weights, {prefix + experts.shared_gate: 1}, hidden, False)

    def __call__(self, x: Floats) -> Floats:
        """float32 (n, hidden_size), normalised -> float32 (n, hidden_size)."""
        chosen, shares = self._route(x)
        y = np.zeros_like(x)
        # One product for all tokens of an expert.
        for number in np.unique(chosen):
            tokens, places = np.nonzero(chosen == number)
            found = self._experts[number](x[tokens])
            found *= shares[tokens, places, None]
            y[tokens] += found
        if self._shared is not None:
            y += self._shared(x) / (1 + np.exp(-self._shared_gate(x)))
        return y

    def _route(self, x: Floats) -> tuple[Ids, Floats]:
        """The experts of each token and their shares, (n, used) each."""
        scores = self._router(x)
        scores -= scores.max(axis=1, keepdims=True)
        shares = np.exp(scores)
        shares /= shares.sum(axis=1, keepdims=True)
        chosen = np.argsort(-shares, axis=1, kind="stable")[:, : self._used]
        shares = np.take_along_axis(shares, chosen, axis=1)
        if self._normalises:
            shares /= shares.sum(axis=1, keepdims=True)
        return chosen, shares


def _numbered(expert: Mlp, number: int) -> Mlp:
    """One of the experts."""
    return replace(expert, up=tuple(name.format(number) for name in expert.up), down=expert.down.format(number))
