"""The trellis of two grids along a row: coded symbols choose on which of two grids, half a step apart, weights lie.

With k the symbols of a row, m[0] = m[1] = 0 and, from j = 1 on, m[j + 1] = (k[j] mod 2) xor m[j - 1]. The weight in
column j lies n[j] = 2 k[j] + m[j] half steps from the origin of the grid, modulo 256. So n are the symbols of an
ordinary grid of half the step.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def half_steps(symbols: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """What the symbols of whole rows stand for, in half steps.

    Args:
        symbols: shape (rows, columns).
    Returns:
        2 k + m modulo 256, the same shape.
    """
    found = np.left_shift(symbols, 1)
    parities = symbols & 1
    # The columns with an even number follow from those with an odd one before them, and the reverse.
    for first in (1, 2):
        grids = found[:, first + 1 :: 2]
        grids |= np.bitwise_xor.accumulate(parities[:, first::2], axis=1)[:, : grids.shape[1]]
    return found
