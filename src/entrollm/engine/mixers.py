"""The part of a layer that mixes tokens, made as the model's configuration says."""

from __future__ import annotations

from typing import Any, Protocol

from entrollm.engine.attention import Angles, SelfAttention
from entrollm.engine.gated_delta import GatedDeltaRule
from entrollm.engine.latent_attention import MultiHeadLatentAttention
from entrollm.engine.mamba import Mamba2Mixer
from entrollm.engine.shared_attention import SharedAttention
from entrollm.engine.short_convolution import GatedConvolution
from entrollm.engine.weights import Floats, Weights
from entrollm.models.config import GatedDelta, LatentAttention, Mamba2, ModelConfig, SharedKeys, ShortConvolution


class TokenMixer(Protocol):
    """The part of a layer that mixes tokens."""

    def __call__(self, x: Floats, angles: Angles | None, cache: Any, /) -> Floats:
        """float32 (n, hidden_size), normalised -> float32 (n, hidden_size).

        Args:
            x: n tokens.
            angles: of the rotation; None if the layer does not rotate.
            cache: what the layer keeps of the sequence, as `new_layer_state` makes it, or of each sequence; that of an
                earlier layer for shared keys.
        """


def make_mixer(config: ModelConfig, weights: Weights, prefix: str, index: int) -> TokenMixer:
    """The mixer of layer `index`, whose names start with `prefix`.

    Raises:
        FormatError: a tensor is missing or has another shape.
    """
    match config.mixer(index):
        case LatentAttention() as form:
            return MultiHeadLatentAttention(config, weights, prefix, form)
        case GatedDelta() as form:
            return GatedDeltaRule(config, weights, prefix, form)
        case ShortConvolution() as form:
            return GatedConvolution(config, weights, prefix, form)
        case Mamba2() as form:
            return Mamba2Mixer(config, weights, prefix, form)
        case SharedKeys():
            return SharedAttention(config, weights, prefix)
    return SelfAttention(config, weights, prefix)
