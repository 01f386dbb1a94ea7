"""A model's own layer for guesses, which knows the next token and says the one after it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from entrollm.engine.attention import Angles, Rotations
from entrollm.engine.cache import LayerState, new_layer_state
from entrollm.engine.projection import Projection, load_norm
from entrollm.engine.weights import Floats, Ids, Weights
from entrollm.models.config import ModelConfig
from entrollm.models.config import TokenHead as Form


class RunLayer(Protocol):
    """A layer of the model."""

    def __call__(self, x: Floats, angles: Angles | None, state: LayerState, /) -> Floats:
        """float32 (n, hidden_size) -> a new float32 (n, hidden_size)."""


@dataclass(frozen=True)
class SharedParts:
    """What the head shares with the model.

    Attributes:
        embeddings: from ids and the position of the first to float32 (n, hidden_size).
        rotations: of the layers.
        logits: from what is behind a norm, float32 (n, hidden_size), to float32 (n, vocab_size).
    """

    embeddings: Callable[[Ids, int], Floats]
    rotations: Rotations
    logits: Callable[[Floats], Floats]


class TokenHead:
    """The layer with the norms and the projection around it.

    Raises:
        FormatError: a tensor is missing or has another shape.
    """

    def __init__(self, config: ModelConfig, weights: Weights, form: Form, layer: RunLayer, shared: SharedParts) -> None:
        self._config, self._like = config, form.like
        self._token_norm, self._hidden_norm, self._norm = (
            load_norm(config, weights, name) for name in (form.token_norm, form.hidden_norm, form.norm)
        )
        hidden = config.hidden_size
        self._projection = Projection(weights, {form.projection: hidden}, 2 * hidden, False)
        self._layer, self._shared = layer, shared

    def new_state(self) -> LayerState:
        """What the layer keeps of a sequence."""
        return new_layer_state(self._config, self._like)

    def __call__(self, hidden: Floats, ids: Sequence[int], start: int, state: LayerState) -> Floats:
        """Run the layer on n positions that follow those in the state.

        Args:
            hidden: float32 (n, hidden_size), of the model behind its last norm, or of this head.
            ids: the n tokens that follow these.
            start: position of the first.
            state: from new_state().
        Returns:
            float32 (n, hidden_size), for `logits`, and for the next position.
        """
        tokens = self._shared.embeddings(np.array(ids, dtype=np.int64), start)
        x = self._projection(np.concatenate([self._token_norm(tokens), self._hidden_norm(hidden)], axis=1))
        angles = self._shared.rotations.rows(start, len(hidden), False)[self._like]
        return self._norm(self._layer(x, angles, state))

    def logits(self, hidden: Floats) -> Floats:
        """The logits of the tokens after `ids`: float32 (n, hidden_size) -> (n, vocab_size)."""
        return self._shared.logits(hidden)
