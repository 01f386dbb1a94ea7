"""Code lengths of a code tree, for quantizers that round by what a symbol costs."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from entrollm.format.code import RAW_BITS, Code, Field, Leaf, Node, Split

_ABSENT = -1.0


def code_lengths(code: Code) -> NDArray[np.float64]:
    """Bits that each symbol takes in a code.

    Symbols that the code does not hold get the longest length and four bits more: a code made for a histogram with
    them would make room for them.

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
        # Named symbols keep their own length; the tree is left to the end for a raw field.
        lengths[lengths == _ABSENT] = above + RAW_BITS
    else:
        _visit_field(node, above + node.bits, lengths)


def _visit_field(node: Field, length: float, lengths: NDArray[np.float64]) -> None:
    named = np.array(node.symbols, np.int64)
    lengths[named] = length
    if node.escape is not None:
        _visit(node.escape, length, lengths)
