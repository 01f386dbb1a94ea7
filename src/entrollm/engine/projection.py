"""Linear layers and norms of a decoder, loaded by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from entrollm import _core
from entrollm.engine.linear import CodedLinear
from entrollm.engine.weights import Embedding, Floats, Weights, load_embedding, load_linear, load_tensor
from entrollm.format.layout import transposed_name
from entrollm.models.config import ModelConfig

# Rows of a transposed matrix that are decoded at once.
_ROWS_AT_ONCE = 256

Apply = Callable[[Floats], Floats]


class Projection:
    """One or more linear layers on the same input, their outputs side by side.

    Args:
        weights: the model's tensors.
        outputs: out_features of each part, by name without the suffix.
        in_features: of every part.
        bias: whether every part has one, named `.bias`; or the biases of all parts.
        is_transposed: the matrix, of which there is one, is stored as (in_features, out_features), or its transpose
            under the name of one.
        suffix: what the names of the matrices end with.
    Raises:
        FormatError: a tensor is missing or has another shape.
    """

    def __init__(
        self,
        weights: Weights,
        outputs: dict[str, int],
        in_features: int,
        bias: bool | Floats,
        is_transposed: bool = False,
        suffix: str = ".weight",
    ) -> None:
        self._linear: Apply
        if is_transposed:
            ((name, size),) = outputs.items()
            turned = transposed_name(name + suffix)
            if turned in weights:
                self._linear = load_linear(weights, {turned: (size, in_features)})
            else:
                self._linear = _Transposed(load_embedding(weights, name + suffix, (in_features, size)))
        else:
            shapes = {name + suffix: (size, in_features) for name, size in outputs.items()}
            self._linear = load_linear(weights, shapes)
        self._bias: Floats | None = None
        if not isinstance(bias, bool):
            self._bias = bias
        elif bias:
            parts = [load_tensor(weights, f"{name}.bias", (size,)) for name, size in outputs.items()]
            self._bias = np.concatenate(parts)

    def native(self) -> _core.JoinedProduct | None:
        """The product for native layers, made once; None if they do not take it.

        Raises:
            CorruptStreamError: the bytes of a matrix are damaged.
        """
        return self._linear.native(self._bias) if isinstance(self._linear, CodedLinear) else None

    def __call__(self, x: Floats) -> Floats:
        """float32 (n, in_features) -> float32 (n, sum of out_features)."""
        y = self._linear(x)
        if self._bias is not None:
            y += self._bias
        return y


class _Transposed:
    """A matrix that is stored as (in_features, out_features), of which a product decodes some rows after others."""

    def __init__(self, matrix: Embedding) -> None:
        self._matrix = matrix

    def __call__(self, x: Floats) -> Floats:
        """float32 (n, in_features) -> float32 (n, out_features)."""
        in_features, out_features = self._matrix.shape
        y = np.zeros((len(x), out_features), dtype=np.float32)
        for start in range(0, in_features, _ROWS_AT_ONCE):
            rows = np.arange(start, min(in_features, start + _ROWS_AT_ONCE))
            y += x[:, rows[0] : rows[-1] + 1] @ self._matrix.rows(rows)
        return y


@dataclass(frozen=True)
class Norm:
    """A norm over the features of a token: float32 (n, hidden_size) -> a new one.

    Attributes:
        weight: what the result is multiplied by, float32 (hidden_size,).
        bias: what is added to it; None if there is none.
        is_centered: the mean is subtracted first.
        eps: added to the mean square.
        pool: threads.
    """

    weight: Floats
    bias: Floats | None
    is_centered: bool
    eps: float
    pool: _core.ThreadPool

    def __call__(self, x: Floats) -> Floats:
        """float32 (n, hidden_size) -> a new float32 (n, hidden_size)."""
        if self.is_centered:
            x = x - x.mean(axis=-1, keepdims=True)
        y = _core.rms_norm(x, self.weight, self.eps, self.pool)
        if self.bias is not None:
            y += self.bias
        return y


def load_norm(config: ModelConfig, weights: Weights, name: str) -> Norm:
    """The norm `name`, without `.weight`.

    Raises:
        FormatError: a tensor is missing or has another shape.
    """
    kind, shape = config.norm, (config.hidden_size,)
    weight = offset_weight(config, load_tensor(weights, f"{name}.weight", shape))
    bias = load_tensor(weights, f"{name}.bias", shape) if kind.has_bias else None
    return Norm(weight, bias, kind.is_centered, config.norm_eps, weights.pool)


def offset_weight(config: ModelConfig, weight: Floats) -> Floats:
    """The weight that a norm multiplies by, from the stored one."""
    offset = config.norm.weight_offset
    return weight + np.float32(offset) if offset else weight
