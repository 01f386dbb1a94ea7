"""Experts: feed-forward parts of which each token runs through the few that a router chooses."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from entrollm import _core
from entrollm.engine.arithmetic import sigmoid
from entrollm.engine.feed_forward import FeedForward
from entrollm.engine.projection import Projection, load_norm
from entrollm.engine.weights import Floats, Ids, Weights, load_tensor
from entrollm.models.config import Beside, Experts, Mlp, ModelConfig


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

    def __call__(self, x: Floats, routed: Floats | None = None) -> Floats:
        """float32 (n, hidden_size), normalised -> float32 (n, hidden_size).

        Args:
            x: n tokens.
            routed: what the router sees of them; None for the same.
        """
        chosen, shares = self._router(x if routed is None else routed)
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


class ExpertsBeside:
    """Experts and the usual feed-forward part beside them, on the same input, each between norms of its own.

    Raises:
        FormatError: a tensor is missing or has another shape.
    """

    def __init__(self, config: ModelConfig, weights: Weights, prefix: str, experts: Experts, beside: Beside) -> None:
        self._experts = MixedExperts(config, weights, prefix, experts)
        self._mlp = FeedForward(config, weights, prefix, config.mlp)
        self._norm, self._output_norm, self._experts_norm, self._experts_output_norm = (
            load_norm(config, weights, prefix + name)
            for name in (beside.norm, beside.output_norm, beside.experts_norm, beside.experts_output_norm)
        )

    def __call__(self, x: Floats) -> Floats:
        """float32 (n, hidden_size), not normalised -> float32 (n, hidden_size)."""
        y = self._output_norm(self._mlp(self._norm(x)))
        y += self._experts_output_norm(self._experts(self._experts_norm(x), x))
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
        self._norm: Floats | None = None
        self._factors: Floats | None = None
        self._eps, self._pool = config.norm_eps, weights.pool
        if self._routing.norm:
            weight = load_tensor(weights, prefix + self._routing.norm, (config.hidden_size,))
            self._norm = weight * np.float32(self._routing.norm_scale)
        if self._routing.factors:
            self._factors = load_tensor(weights, prefix + self._routing.factors, (experts.count,))
        self._correction: Floats | None = None
        if self._routing.correction:
            shape = (1, experts.count) if self._routing.is_correction_matrix else (experts.count,)
            self._correction = load_tensor(weights, prefix + self._routing.correction, shape).reshape(-1)

    def __call__(self, x: Floats) -> tuple[Ids, Floats]:
        """The experts of each token and their weights, (n, used) each: float32 (n, hidden_size) -> both."""
        routing = self._routing
        if self._norm is not None:
            x = _core.rms_norm(x, self._norm, self._eps, self._pool)
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
        if self._factors is not None:
            shares *= self._factors[chosen]
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
