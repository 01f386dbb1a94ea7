"""The feed-forward part of a layer."""

from __future__ import annotations

from functools import partial

from entrollm import _core
from entrollm.engine.arithmetic import ACTIVATIONS, clamped_glu
from entrollm.engine.projection import Apply, Projection
from entrollm.engine.weights import Floats, Weights
from entrollm.models.config import Mlp, ModelConfig

# Of gated parts, by their activation.
_GATED = {"silu": _core.swiglu, "gelu_tanh": _core.geglu}


class FeedForward:
    """Two projections with an activation between them, which is gated or not.

    Args:
        config: the model's.
        weights: its tensors.
        prefix: what the names of the layer start with.
        mlp: the part.
        biases: of the projections into and out of it, where their names do not tell.
    Raises:
        FormatError: a tensor is missing or has another shape.
    """

    def __init__(
        self,
        config: ModelConfig,
        weights: Weights,
        prefix: str,
        mlp: Mlp,
        biases: tuple[Floats, Floats] | None = None,
    ) -> None:
        hidden, inner = config.hidden_size, mlp.size
        width = 2 * inner if config.is_gated else inner
        up_bias, down_bias = biases or (mlp.has_bias, mlp.has_bias)
        up = {prefix + name: width // len(mlp.up) for name in mlp.up}
        self._up = Projection(weights, up, hidden, up_bias, mlp.is_transposed, mlp.suffix)
        down = {prefix + mlp.down: hidden}
        self._down = Projection(weights, down, inner, down_bias, mlp.is_transposed, mlp.suffix)
        self._inner = inner
        self._pool = weights.pool
        self._function = ACTIVATIONS[config.activation]
        self._gated_natively = _GATED.get(config.activation) if config.is_gated and mlp.glu is None else None
        self._activate: Apply = self._gated if config.is_gated else self._function
        if mlp.glu is not None:
            self._activate = partial(clamped_glu, mlp.glu.slope, mlp.glu.limit)

    def __call__(self, x: Floats) -> Floats:
        """float32 (n, hidden_size), normalised -> float32 (n, hidden_size)."""
        return self._down(self._activate(self._up(x)))

    def native(self, surroundings: _core.Surroundings) -> _core.FeedForwardBlock | None:
        """This part with what surrounds it as native code; None if that lacks an option or a kind of matrix.

        Raises:
            CorruptStreamError: the bytes of a matrix are damaged.
        """
        if self._gated_natively is None:
            return None
        up, down = self._up.native(), self._down.native()
        if up is None or down is None:
            return None
        return _core.FeedForwardBlock(up, down, surroundings, self._gated_natively is _core.geglu)

    def _gated(self, x: Floats) -> Floats:
        if self._gated_natively is not None:
            return self._gated_natively(x, self._pool)
        y = self._function(x[:, : self._inner])
        y *= x[:, self._inner :]
        return y
