"""Experts: feed-forward parts of which each token runs through the few that a router chooses."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from entrollm.engine.arithmetic import sigmoid
from entrollm.engine.feed_forward import FeedForward
from entrollm.engine.projection import Projection
from entrollm.engine.weights import Floats, Ids, Weights, load_tensor
from entrollm.models.config import Experts, Mlp, ModelConfig


class MixedExperts:
    """The experts of one layer. The matrices of an expert are read when a token is routed to it.

    Raises:
        FormatError: a tensor is missing or has another shape.
    """

    def __init__(self, config: ModelConfig, weights: Weights, prefix: str, experts: Experts) -> None:
        hidden = config.hidden_size
        self._router = Router(config, weights, prefix, experts)
        expert = experts.expert
        if experts.stack is not None and prefix + _numbered(experts.stack, 0).down + experts.stack.suffix in weights:
            expert = experts.stack
        sizes = 2 * expert.size if config.is_gated else expert.size, hidden
        biases = [
            load_tensor(weights, prefix + name, (experts.count, size))
            for name, size in zip(experts.biases, sizes, strict=False)
        ]
        numbered = [_numbered(expert, number) for number in range(experts.count)]
        self._experts = [
            FeedForward(
                config,
                weights,
                prefix,
                part,
                (biases[0][number], biases[1][number]) if biases else None,
            )
            for number, part in enumerate(numbered)
        ]
        names = [[prefix + name + each.suffix for name in (*each.up, each.down)] for each in numbered]
        self._fetch = weights.fetcher(names)
        self._shared: FeedForward | None = None
        self._shared_gate: Projection | None = None
        if experts.shared is not None:
            self._shared = FeedForward(config, weights, prefix, experts.shared)
            if experts.shared_gate:
                self._shared_gate = Projection(weights, {prefix + experts.shared_gate: 1}, hidden, False)

    def __call__(self, x: Floats) -> Floats:
        """float32 (n, hidden_size), normalised -> float32 (n, hidden_size)."""
        chosen, shares = self._router(x)
        y = np.zeros_like(x)
        numbers = np.unique(chosen)
        if self._fetch is not None:
            self._fetch(numbers.tolist())
        # One product for all tokens of an expert.
        for number in numbers:
            tokens, places = np.nonzero(chosen == number)
            found = self._experts[number](x[tokens])
            found *= shares[tokens, places, None]
            y[tokens] += found
        if self._shared is not None:
            found = self._shared(x)
            if self._shared_gate is not None:
                found *= sigmoid(self._shared_gate(x))
            y += found
        return y


class Router:
    """Chooses the experts of each token, and their weights.

    Raises:
        FormatError: a tensor is missing or has another shape.
    """

    def __init__(self, config: ModelConfig, weights: Weights, prefix: str, experts: Experts) -> None:
        self._experts = experts
        self._routing = experts.routing
        scores = {prefix + experts.router: experts.count}
        self._products = Projection(weights, scores, config.hidden_size, self._routing.has_bias)
        self._correction: Floats | None = None
        if self._routing.correction:
            shape = (1, experts.count) if self._routing.is_correction_matrix else (experts.count,)
            self._correction = load_tensor(weights, prefix + self._routing.correction, shape).reshape(-1)

    def __call__(self, x: Floats) -> tuple[Ids, Floats]:
        """The experts of each token and their weights, (n, used) each: float32 (n, hidden_size) -> both."""
        routing = self._routing
        products = self._products(x)
        if routing.scores == "sparse_mixer":
            return _sparse_mixer(products, routing.jitter)
        scores = _softmax(products) if routing.scores == "softmax" else sigmoid(products)
        ranks = scores if self._correction is None else scores + self._correction
        if routing.groups > 1:
            ranks = self._within_groups(ranks)
        chosen = np.argsort(-ranks, axis=1, kind="stable")[:, : self._experts.used]
        shares = np.take_along_axis(scores, chosen, axis=1)
        if self._experts.normalises:
            shares /= np.maximum(shares.sum(axis=1, keepdims=True), np.float32(max(routing.least_sum, 1e-20)))
        if routing.scale != 1.0:
            shares *= np.float32(routing.scale)
        return chosen, shares

    def _within_groups(self, ranks: Floats) -> Floats:
        """The ranks, -inf outside the best groups."""
        routing = self._routing
        grouped = ranks.reshape(len(ranks), routing.groups, -1)
        best = np.sort(grouped, axis=2)[:, :, -routing.best :].sum(axis=2)
        groups = np.argsort(-best, axis=1, kind="stable")[:, : routing.used_groups]
        found = np.full_like(grouped, -np.inf)
        rows = np.arange(len(ranks))[:, None]
        found[rows, groups] = grouped[rows, groups]
        return found.reshape(ranks.shape)


def _softmax(x: Floats) -> Floats:
    y: Floats = np.exp(x - x.max(axis=1, keepdims=True))
    y /= y.sum(axis=1, keepdims=True)
    return y


def _sparse_mixer(products: Floats, jitter: float) -> tuple[Ids, Floats]:
    """The two best experts, each weighted by its softmax among those that are nearly as good and not chosen before."""
    left = products.copy()
    rows = np.arange(len(products))
    chosen, shares = [], []
    for _ in range(2):
        best = left.argmax(axis=1)
        most = left[rows, best][:, None]
        is_near = (most - products) / np.maximum(np.abs(products), most) <= np.float32(2 * jitter)
        shares.append(_softmax(np.where(is_near, left, np.float32(-np.inf)))[rows, best])
        chosen.append(best)
        left[rows, best] = -np.inf
    return np.stack(chosen, axis=1), np.stack(shares, axis=1)


def _numbered(expert: Mlp, number: int) -> Mlp:
    """One of the experts."""
    return replace(expert, up=tuple(name.format(number) for name in expert.up), down=expert.down.format(number))
