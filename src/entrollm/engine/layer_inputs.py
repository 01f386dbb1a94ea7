"""Vectors of each token for each layer, which enter it beside the residual stream."""

from __future__ import annotations

import numpy as np

from entrollm import _core
from entrollm.engine.arithmetic import ACTIVATIONS
from entrollm.engine.projection import Projection, load_norm, offset_weight
from entrollm.engine.weights import Floats, Ids, Weights, load_embedding, load_tensor
from entrollm.models.config import LayerInputs, ModelConfig


class TokenInputs:
    """Makes the vectors of all layers from the tokens.

    Raises:
        FormatError: a tensor is missing or has another shape.
    """

    def __init__(self, config: ModelConfig, weights: Weights, form: LayerInputs) -> None:
        self._shape = config.num_layers, form.size
        width = config.num_layers * form.size
        self._embedding = load_embedding(weights, form.embedding, (form.vocab_size, width))
        self._projection = Projection(weights, {form.model_projection: width}, config.hidden_size, False)
        # What it makes is divided by the root of hidden_size before the norm, which has that much larger an epsilon.
        weight = offset_weight(config, load_tensor(weights, f"{form.model_norm}.weight", (form.size,)))
        self._norm, self._eps = np.tile(weight, (config.num_layers, 1)), config.norm_eps * config.hidden_size
        self._pool = weights.pool

    def __call__(self, ids: Ids, embedded: Floats) -> Floats:
        """The vectors of n tokens.

        Args:
            ids: int64 (n,).
            embedded: float32 (n, hidden_size), the tokens as they enter the first layer.
        Returns:
            float32 (layers, n, size).
        Raises:
            ValueError: the embedding has no such token.
        """
        known = self._embedding.shape[0]
        if ids.max(initial=0) >= known:
            raise ValueError(f"the layers of this model have inputs for {known} tokens, found the id {ids.max()}")
        projected = self._projection(embedded).reshape(len(ids), *self._shape)
        vectors = _core.rms_norm(projected, self._norm, self._eps, self._pool)
        looked_up = self._embedding.rows(ids).reshape(vectors.shape)
        looked_up *= np.float32(self._shape[1] ** 0.5)
        vectors += looked_up
        vectors *= np.float32(0.5**0.5)
        return np.ascontiguousarray(vectors.swapaxes(0, 1))


class LayerInput:
    """What a layer does with its vectors.

    Raises:
        FormatError: a tensor is missing or has another shape.
    """

    def __init__(self, config: ModelConfig, weights: Weights, prefix: str, form: LayerInputs) -> None:
        hidden = config.hidden_size
        self._gate = Projection(weights, {prefix + form.gate: form.size}, hidden, False)
        self._projection = Projection(weights, {prefix + form.projection: hidden}, form.size, False)
        self._norm = load_norm(config, weights, prefix + form.norm)
        self._activate = ACTIVATIONS[config.activation]

    def __call__(self, x: Floats, vectors: Floats) -> Floats:
        """What is added to the residual stream: float32 (n, hidden_size) and (n, size) -> (n, hidden_size)."""
        return self._norm(self._projection(self._activate(self._gate(x)) * vectors))
