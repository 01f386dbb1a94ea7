"""Run many token windows through a model one layer at a time, so that one layer's weights are in memory at once."""

from __future__ import annotations

import numpy as np

from entrollm.engine.attention import Rotations
from entrollm.engine.cache import new_layer_state
from entrollm.engine.decoder import Embeddings, Layer
from entrollm.engine.weights import Floats, Ids, Weights
from entrollm.models.config import ModelConfig


class LayerWalk:
    """The hidden states of windows of tokens between two layers.

    Args:
        config: the model's.
        weights: its tensors; only the embedding is read here.
        windows: int64, shape (windows, tokens), each window from an empty context.
    """

    def __init__(self, config: ModelConfig, weights: Weights, windows: Ids) -> None:
        self._config = config
        embeddings = Embeddings(config, weights)
        tokens = windows.shape[1]
        rotations = Rotations(config)
        self._angles = rotations.rows(0, tokens, rotations.is_long(tokens))
        self.hidden: list[Floats] = [embeddings(ids, 0) for ids in windows]

    def step(self, index: int, weights: Weights) -> None:
        """Run layer `index`, which is the next one, on all windows.

        Raises:
            FormatError: a tensor of the layer is missing or has the wrong shape.
        """
        layer = Layer(self._config, weights, index)
        for number, x in enumerate(self.hidden):
            self.hidden[number] = np.asarray(layer(x, self._angles[index], new_layer_state(self._config, index)))
