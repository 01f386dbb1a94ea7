"""How much the precision of each matrix matters to a model's predictions, without any data.

A decoder's matrices have the same roles in every architecture, and relative errors of equal size do damage that
depends much on the role: little in queries and keys, whose errors the softmax forgives, much in
values and in the embedding. The shares below are the KL divergence that a relative error of one unit in all matrices
of a role causes (KL = share * error^2); a role's share is spread evenly over its matrices and their weights, so that a
role with few weights gets finer steps. They were measured on the example model alone, with windows of WikiText-2 test:
figures on that text favour them, and how well they carry over to other models is not known yet.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

_SHARES: Mapping[str, float] = {
    "q_proj": 0.25,
    "k_proj": 0.36,
    "v_proj": 1.9,
    "qkv_proj": 2.5,
    "o_proj": 0.73,
    "gate_proj": 1.76,
    "up_proj": 1.57,
    "gate_up_proj": 3.3,
    "down_proj": 2.24,
    "embed_tokens": 1.0,
    "lm_head": 2.3,
}
_EMBEDDING, _HEAD = "embed_tokens", "lm_head"
# The first layer reads the bare embedding, which every later layer builds on.
_FIRST_LAYER = ".layers.0."
_FIRST_LAYER_FACTOR = 2.5
# Shares are averages over models: steps follow a little less than all of them.
_TRUST = 0.9
_WIDEST = 4.0
# Token ids follow frequency roughly (merges are numbered as they were found), and a token's row matters as often as
# the token occurs.
_FREQUENT_RANKS = 100
_FREQUENCY_POWER = 0.25
_SMALLEST_VOCABULARY = 1024


def relative_steps(shapes: Mapping[str, tuple[int, int]]) -> dict[str, float]:
    """The step of each matrix, over its RMS, relative to the others: equal marginal damage per bit.

    Args:
        shapes: the matrices of one model by name.
    Returns:
        factors around 1; their mean over weights, in logarithms, is 0.
    """
    roles = {name: _role(name) for name in shapes}
    counts = {role: sum(1 for other in roles.values() if other == role) for role in set(roles.values())}
    logs = {}
    for name, (rows, columns) in shapes.items():
        share = _share(roles[name], tied=_HEAD not in counts)
        if share is not None:
            importance = share / counts[roles[name]] / (rows * columns)
            if _FIRST_LAYER in name:
                importance *= _FIRST_LAYER_FACTOR
            logs[name] = -0.5 * _TRUST * math.log(importance)
    known = sum(shapes[name][0] * shapes[name][1] for name in logs)
    mean = sum(value * shapes[name][0] * shapes[name][1] for name, value in logs.items()) / max(1, known)
    return {name: min(_WIDEST, max(1 / _WIDEST, math.exp(logs.get(name, mean) - mean))) for name in shapes}


def row_precision(name: str, rows: int) -> NDArray[np.float32] | None:
    """What the rows of an embedding or output head divide their steps by; None for other matrices."""
    if _role(name) not in (_EMBEDDING, _HEAD) or rows < _SMALLEST_VOCABULARY:
        return None
    precision = (np.arange(rows) + float(_FREQUENT_RANKS)) ** -_FREQUENCY_POWER
    scaled: NDArray[np.float32] = (precision / np.exp(np.log(precision).mean())).astype(np.float32)
    return scaled


def _role(name: str) -> str:
    parts: Sequence[str] = name.split(".")
    return parts[-2] if len(parts) > 1 else name


def _share(role: str, tied: bool) -> float | None:
    if role == _EMBEDDING and tied:
        return _SHARES[_EMBEDDING] + _SHARES[_HEAD]
    return _SHARES.get(role)
