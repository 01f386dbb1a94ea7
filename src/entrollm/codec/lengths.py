"""The code lengths of a code tree, for quantizers that round by the cost of symbols."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from entrollm.codec.flat import best_window
from entrollm.format.code import RAW_BITS, Field, Leaf, Node, Split
from entrollm.format.flat import AnyCode, FlatCode

_ABSENT = -1.0


def code_lengths(code: AnyCode, counts: Sequence[int]) -> NDArray[np.float64]:
    """The bits that each symbol takes in a code.

    Symbols that are not in the code get the longest length plus four bits, since a code for a histogram that had them
    would include them.

    Args:
        code: the code.
        counts: the histogram that it was chosen for, 256 entries, which decides on the fields of a flat code.
    Returns:
        float64, shape (256,).
    """
    if isinstance(code, FlatCode):
        return best_window(counts)[0].lengths()
    of_high = np.full(256, _ABSENT)
    _visit(code.tree, float(code.low_bits), of_high)
    lengths: NDArray[np.float64] = of_high[np.arange(256) >> code.low_bits << code.low_bits]
    lengths[lengths == _ABSENT] = lengths.max() + 4
    return lengths


def _visit(node: Node, above: float, lengths: NDArray[np.float64]) -> None:
    if isinstance(node, Leaf):
        lengths[node.symbol] = above
    elif isinstance(node, Split):
        _visit(node.left, above + 1, lengths)
        _visit(node.right, above + 1, lengths)
    elif node.bits == RAW_BITS:
        # A raw field codes the symbols that no field lists; fields that are visited later overwrite their lengths.
        lengths[lengths == _ABSENT] = above + RAW_BITS
    else:
        _visit_field(node, above + node.bits, lengths)


def _visit_field(node: Field, length: float, lengths: NDArray[np.float64]) -> None:
    named = np.array(node.symbols, np.int64)
    lengths[named] = length
    if node.escape is not None:
        _visit(node.escape, length, lengths)
