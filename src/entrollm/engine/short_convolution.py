"""Gated short convolutions (LFM2)."""

from __future__ import annotations

import numpy as np

from entrollm.engine.attention import Angles
from entrollm.engine.projection import Projection
from entrollm.engine.state import Recurrence, RecurrentState, convolve, load_kernel
from entrollm.engine.weights import Floats, Weights, load_tensor
from entrollm.models.config import ModelConfig, ShortConvolution


class GatedConvolution:
    """The mixer of one layer: a convolution of gated features, gated again.

    Raises:
        FormatError: a tensor is missing or has another shape.
    """

    def __init__(self, config: ModelConfig, weights: Weights, prefix: str, form: ShortConvolution) -> None:
        hidden, place = config.hidden_size, f"{prefix}conv."
        self._input = Projection(weights, {f"{place}in_proj": 3 * hidden}, hidden, form.has_bias)
        self._output = Projection(weights, {f"{place}out_proj": hidden}, hidden, form.has_bias)
        self._kernel = load_kernel(weights, f"{place}conv.weight", hidden, form.kernel)
        self._bias = load_tensor(weights, f"{place}conv.bias", (hidden,)) if form.has_bias else None

    def __call__(self, x: Floats, angles: Angles | None, cache: Recurrence) -> Floats:
        """float32 (n, hidden_size), normalised -> float32 (n, hidden_size)."""
        before, after, features = np.split(self._input(x), 3, axis=1)
        return self._output(after * cache.advance([before * features], self._step))

    def _step(self, state: RecurrentState, /, *rows: Floats) -> Floats:
        return convolve(state, rows[0], self._kernel, self._bias)
