"""Matrices with group scales as imported checkpoints have them, with random contents."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np

from entrollm.format.group_scales import GroupedKind, GroupScales

_GPTQ = {"group_scale": "F16", "group_zero": "U8"}
_K = {"group_scale": "U8", "super_scale": "F16", "group_minimum": "U8", "super_minimum": "F16"}
KINDS: dict[str, tuple[int, GroupedKind]] = {
    "gptq": (4, GroupedKind(128, _GPTQ, arithmetic="F16")),
    "act-order": (
        4,
        GroupedKind(64, {**_GPTQ, "column_order": "U32"}, arithmetic="F16"),
    ),
    "gptq-3": (3, GroupedKind(256, _GPTQ, arithmetic="F16")),
    "compressed-tensors": (4, GroupedKind(32, {"group_scale": "BF16"}, arithmetic="BF16", zero=8)),
    "hqq": (4, GroupedKind(64, {"group_scale": "F16", "group_zero": "F16"}, arithmetic="F16")),
    "q2_k": (2, GroupedKind(16, _K, super_size=256)),
    "q4_k": (4, GroupedKind(32, _K, super_size=256)),
    "q5_k": (5, GroupedKind(32, _K, super_size=256)),
    "q6_k": (6, GroupedKind(16, {"group_scale": "I8", "super_scale": "F16"}, super_size=256, zero=32)),
    "q8_0": (8, GroupedKind(32, {"group_scale": "F16"}, zero=128)),
    "seven bits": (7, GroupedKind(8, {"group_scale": "F32"}, zero=60, factor=0.375)),
    "odd groups": (4, GroupedKind(20, _GPTQ, arithmetic="F16")),
    "one group": (1, GroupedKind(10**6, {"group_scale": "F32", "group_minimum": "F32"})),
    "e4m3": (8, GroupedKind(128, {"group_scale": "F32"}, values="F8_E4M3")),
    "e5m2": (8, GroupedKind(128, {"group_scale": "BF16"}, values="F8_E5M2", arithmetic="BF16")),
}
"""Bits and form, by the name of a source."""


def random_groups(name: str, rows: int, columns: int, seed: int = 0) -> tuple[np.ndarray, GroupScales]:
    """Symbols, uint8 (rows, columns), and scales of one of KINDS."""
    bits, kind = KINDS[name]
    rng = np.random.default_rng(rows + columns + seed)
    symbols = rng.integers(0, 1 << bits, (rows, columns)).astype(np.uint8)
    symbols[0, 0] = (1 << bits) - 1
    if kind.values is not None:
        symbols &= 0xBB  # no infinity and no NaN
    arrays: dict[str, Any] = {}
    for array, count in kind.lengths(rows, columns).items():
        if array == "column_order":
            arrays[array] = rng.permutation(columns).astype(np.uint32)
            continue
        stored = kind.types[array]
        if stored == "U8":
            values = rng.integers(0, 16, count).astype(np.uint8)
        elif stored == "I8":
            values = rng.integers(-60, 60, count).astype(np.int8)
        else:
            dtype = {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}[stored]
            values = (rng.uniform(3, 9, count) if array == "group_zero" else rng.uniform(0.001, 0.01, count)).astype(
                dtype
            )
        arrays[array] = values.reshape(rows, -1)
    return symbols, GroupScales(kind, arrays)
