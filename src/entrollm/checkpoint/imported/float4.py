"""4-bit floats (E2M1) as integers, and the powers of two (E8M0) that scale them.

The values are 0, 0.5, 1, 1.5, 2, 3, 4, 6 and their negatives, which are all multiples of 0.5. A symbol is twice the
value, plus 12; the scale is half of the format's. Both changes are exact. A negative zero becomes zero.
"""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from entrollm.errors import FormatError

ZERO = 12
"""The symbol that stands for 0."""
# The symbol of each 4-bit pattern: sign, two bits of exponent, one of mantissa.
SYMBOLS = np.array([12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0], np.uint8)
# From the next exponent on, a weight may be beyond float32.
_LARGEST_EXPONENT = 252


def unpack_pairs(octets: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """The symbols of neighbouring weights that share a byte, the first in the low half: (..., n) -> (..., 2 n)."""
    pairs = np.stack([octets & np.uint8(15), octets >> 4], axis=-1)
    return SYMBOLS[pairs.reshape(*octets.shape[:-1], -1)]


def half_powers(name: str, exponents: NDArray[np.uint8]) -> NDArray[Any]:
    """Half of the scales that biased exponents stand for, bfloat16: 2^(e - 128).

    Args:
        name: the tensor, for errors.
        exponents: of any shape.
    Raises:
        FormatError: an exponent is NaN, or so large that weights may be beyond float32.
    """
    if exponents.size and (largest := int(exponents.max())) > _LARGEST_EXPONENT:
        what = "not a number" if largest == 255 else f"2^{largest - 127}"
        raise FormatError(
            f"{name}: a scale is {what} (exponent {largest}), and weights with exponents above {_LARGEST_EXPONENT} may "
            "exceed float32; the file is damaged, fetch it again"
        )
    wide = exponents.astype(np.uint16)
    bits = np.where(wide < 2, np.uint16(0x20) << wide, (np.maximum(wide, 1) - 1) << 7)
    return bits.astype(np.uint16).view(ml_dtypes.bfloat16)
