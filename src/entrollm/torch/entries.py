"""Stored entries as tensors and as NumPy arrays; torch and NumPy have different ways to hold bfloat16."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

# The types of lossless words.
WORD_TYPES = {
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}


def to_array(entry: Tensor) -> NDArray[Any]:
    """View a stored entry on the CPU as an array."""
    if entry.dtype == torch.bfloat16:
        return entry.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return entry.numpy()


def to_tensor(array: NDArray[Any]) -> Tensor:
    """Copy a stored entry to a tensor on the CPU."""
    if array.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(array.view(np.int16).copy()).view(torch.bfloat16)
    return torch.from_numpy(array.copy())
