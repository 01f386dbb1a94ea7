"""The code lengths of a code tree, for quantizers that round by the cost of symbols."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from entrollm.format.code import RAW_BITS, Code, Field, Leaf, Node, Split

_ABSENT = -1.0


def code_lengths(code: Code) -> NDArray[np.float64]:
    """The bits that each symbol takes in a code.

    Symbols that are not in the code get the longest length plus four bits, since a code for a histogram that had them
    would include them.

    Returns:
        float64, shape (256,).
    """
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
