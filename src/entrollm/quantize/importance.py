"""How much the precision of each matrix matters to a model's predictions: as measured, or else by its role.

White noise in a matrix raises the KL divergence by share * relative error^2 (`quantize.statistics.Sensitivity`), and
one bit less makes the squared error four times as large. A bit is therefore worth the same in every matrix if the
squares of the steps are in inverse proportion to share / weights.

Without calibration, the share of a matrix is that of its role, since decoders of all architectures have the same
roles. Equal relative errors do little damage in queries and keys, whose errors the softmax forgives, and much in values
and in the embedding. The shares below are those that calibration measures on the example model with text that it wrote
itself. The share of a role is spread evenly over its matrices and their weights.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from entrollm.quantize.statistics import Sensitivity

_SHARES: Mapping[str, float] = {
    "q_proj": 0.27,
    "k_proj": 0.38,
    "v_proj": 2.0,
    "qkv_proj": 2.6,
    "o_proj": 0.85,
    "gate_proj": 1.85,
    "up_proj": 1.6,
    "gate_up_proj": 3.4,
    "down_proj": 2.3,
    "embed_tokens": 1.2,
    "lm_head": 2.4,
}
_EMBEDDING, _HEAD = "embed_tokens", "lm_head"
# The first layer reads the bare embedding, which every later layer builds on.
_FIRST_LAYER = ".layers.0."
_FIRST_LAYER_FACTOR = 2.5
# Large divergences grow less than in proportion, so steps follow the logarithms of the shares by this factor only.
_TRUST = 0.8
# The largest step relative to the mean, and the inverse of the smallest.
_WIDEST = 4.0
# Token ids roughly follow frequency, since merges are numbered in the order in which they were found. The more frequent
# a token is, the more its row matters.
_FREQUENT_RANKS = 100
_SMALLEST_VOCABULARY = 1024
# Equal marginal damage needs steps in proportion to weight ** -0.5. Rows go half of the way, since one code serves all.
_ROW_WEIGHT_POWER = 0.25


def relative_steps(
    shapes: Mapping[str, tuple[int, int]], sensitivities: Mapping[str, Sensitivity] | None = None
) -> dict[str, float]:
    """The step of each matrix over its RMS, relative to the others, at which a bit is worth the same everywhere.

    Args:
        shapes: the matrices of one model by name.
        sensitivities: what was measured, by name; None if absent. Shares of roles are used only if nothing was
            measured; a matrix that was not measured among others gets the mean step.
    Returns:
        factors around 1; the mean of their logarithms over all weights is 0.
    """
    measured = {name: value.share for name, value in (sensitivities or {}).items() if value.share > 0}
    shares = measured or _shares_by_role(shapes)
    logs = {
        name: -0.5 * _TRUST * math.log(shares[name] / (rows * columns) * _spread(name, rows, sensitivities))
        for name, (rows, columns) in shapes.items()
        if name in shares
    }
    known = sum(shapes[name][0] * shapes[name][1] for name in logs)
    mean = sum(value * shapes[name][0] * shapes[name][1] for name, value in logs.items()) / max(1, known)
    return {name: min(_WIDEST, max(1 / _WIDEST, math.exp(logs.get(name, mean) - mean))) for name in shapes}


def row_precision(name: str, rows: int, sensitivity: Sensitivity | None = None) -> NDArray[np.float32] | None:
    """What the steps of the rows of an embedding or output head are divided by; None for other matrices."""
    weights = _row_weights(name, rows, sensitivity)
    if weights is None:
        return None
    precision = weights**_ROW_WEIGHT_POWER
    scaled: NDArray[np.float32] = (precision / np.exp(np.log(precision).mean())).astype(np.float32)
    return scaled


def _row_weights(name: str, rows: int, sensitivity: Sensitivity | None) -> NDArray[np.float64] | None:
    if sensitivity is not None:
        return None if sensitivity.row_weights is None else sensitivity.row_weights.astype(np.float64)
    if _role(name) not in (_EMBEDDING, _HEAD) or rows < _SMALLEST_VOCABULARY:
        return None
    return 1 / (np.arange(rows) + float(_FREQUENT_RANKS))


def _spread(name: str, rows: int, sensitivities: Mapping[str, Sensitivity] | None) -> float:
    """The share of the damage of equal steps that is left if rows that matter more have finer steps."""
    sensitivity = (sensitivities or {}).get(name)
    precision = row_precision(name, rows, sensitivity)
    if precision is None:
        return 1.0
    weights = _row_weights(name, rows, sensitivity)
    assert weights is not None
    return float((weights / np.square(precision, dtype=np.float64)).sum() / weights.sum())


def _shares_by_role(shapes: Mapping[str, tuple[int, int]]) -> dict[str, float]:
    roles = {name: _role(name) for name in shapes}
    counts = {role: sum(1 for other in roles.values() if other == role) for role in set(roles.values())}
    shares = {}
    for name, role in roles.items():
        share = _SHARES.get(role)
        if role == _EMBEDDING and _HEAD not in counts:
            share = _SHARES[_EMBEDDING] + _SHARES[_HEAD]
        if share is not None:
            shares[name] = share / counts[role] * (_FIRST_LAYER_FACTOR if _FIRST_LAYER in name else 1)
    return shares


def _role(name: str) -> str:
    parts: Sequence[str] = name.split(".")
    return parts[-2] if len(parts) > 1 else name
