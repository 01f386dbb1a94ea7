"""Make code trees for a histogram: cascades of fields (flat + escape), and Huffman trees (pivot-coded)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from entrollm.codec.cost import CostModel
from entrollm.codec.huffman import limited_lengths
from entrollm.format.code import MAX_FIELD_BITS, RAW_BITS, Field, Node, Split

# Codes longer than this save nothing that can be measured, and make trees deep.
_MAX_LENGTH = 16


@dataclass(frozen=True, slots=True)
class Ranked:
    """The distinct symbols by falling count.

    Attributes:
        symbols, counts: in order of rank.
        tails: tails[i] is the count of all symbols from rank i on; the last one is 0.
    """

    symbols: tuple[int, ...]
    counts: tuple[int, ...]
    tails: tuple[int, ...]


def rank(counts: Sequence[int]) -> Ranked:
    """Rank the symbols of a histogram of 256 entries."""
    order = sorted((s for s, c in enumerate(counts) if c), key=lambda s: (-counts[s], s))
    tails = [0]
    for symbol in reversed(order):
        tails.append(tails[-1] + counts[symbol])
    return Ranked(tuple(order), tuple(counts[s] for s in order), tuple(reversed(tails)))


class Cascades:
    """The cheapest cascade of fields for every tail of a ranking, by dynamic programming from the last symbol.

    A level of a cascade gives the next 2**k - 1 symbols a field of k bits and escapes the others to the next level. The
    last level has no escape.
    """

    def __init__(self, ranked: Ranked, model: CostModel) -> None:
        self._ranked = ranked
        self._model = model
        size = len(ranked.symbols)
        self._costs = [0.0] * (size + 1)
        self._widths = [0] * (size + 1)  # negative for a last level
        for start in range(size - 1, -1, -1):
            self._costs[start], self._widths[start] = min(self._options(start, root=False))

    def _options(self, start: int, root: bool) -> list[tuple[float, int]]:
        remaining = len(self._ranked.symbols) - start
        count = self._ranked.tails[start]
        options = []
        for bits in [*range(1, MAX_FIELD_BITS + 1), RAW_BITS]:
            last = 2**bits >= remaining
            if last or bits < RAW_BITS:
                if root:
                    cost = self._model.root(bits, escape=not last, is_split=False)
                else:
                    cost = self._model.sparse_list(bits, count, escape=not last)
                after = 0.0 if last else self._costs[start + 2**bits - 1]
                options.append((cost + after, -bits if last else bits))
        return options

    def cost(self, start: int) -> float:
        """The cost of the best cascade below the root for the symbols from rank `start` on."""
        return self._costs[start]

    def tree(self, start: int) -> Node:
        """The cascade whose cost `cost` returns."""
        return self._level(start, self._widths[start])

    def root(self) -> tuple[float, Node]:
        """The best cascade for the whole code."""
        cost, width = min(self._options(0, root=True))
        return cost, self._level(0, width)

    def _level(self, start: int, width: int) -> Node:
        symbols = self._ranked.symbols[start:]
        if width == -RAW_BITS:
            return Field(RAW_BITS, ())
        if width < 0:
            # Unused field values repeat the last symbol, so that every value decodes to a symbol.
            return Field(-width, symbols + symbols[-1:] * (2**-width - len(symbols)))
        taken = 2**width - 1
        return Field(width, symbols[:taken], self.tree(start + taken))


@dataclass(frozen=True, slots=True)
class _Item:
    """A subtree without a parent yet; `symbol` is set for leaves, `node` for others."""

    count: int
    cost: float
    symbol: int | None = None
    node: Node | None = None


def huffman_shape(ranked: Ranked, kept: int, cascades: Cascades, model: CostModel) -> tuple[float, Node]:
    """A tree with the Huffman lengths of the first `kept` symbols and one escape for the others.

    All trees with these lengths take the same bits, so siblings are chosen for fast decoding: 2**k siblings, of which
    at most one is not a leaf, become one field, and a leaf beside a subtree becomes a field with an escape. Two
    subtrees need a split, which is the most expensive node to decode.

    Args:
        ranked: at least two symbols.
        kept: 1 to len(ranked.symbols); the best cascade codes the other symbols.
        cascades: the cascades of `ranked`.
        model: the cost of nodes.
    Returns:
        the cost in bits over the whole matrix, and the tree.
    """
    items = [_Item(c, 0.0, symbol=s) for s, c in zip(ranked.symbols[:kept], ranked.counts[:kept], strict=True)]
    if kept < len(ranked.symbols):
        items.append(_Item(ranked.tails[kept], cascades.cost(kept), node=cascades.tree(kept)))
    lengths = limited_lengths([item.count for item in items], _MAX_LENGTH)
    levels: dict[int, list[_Item]] = {}
    for item, length in zip(items, lengths, strict=True):
        levels.setdefault(length, []).append(item)
    for depth in range(max(lengths), 0, -1):
        _group_level(levels, depth, model)
    (root,) = levels[0]
    assert root.node is not None
    return root.cost, root.node


def _group_level(levels: dict[int, list[_Item]], depth: int, model: CostModel) -> None:
    """Give every item at `depth` a parent, which is one or more levels above."""
    items = levels.pop(depth, [])
    leaves = sorted((item for item in items if item.symbol is not None), key=lambda item: item.count)
    subtrees = sorted((item for item in items if item.symbol is None), key=lambda item: item.count)
    for bits in range(min(MAX_FIELD_BITS, depth), 1, -1):
        while len(leaves) + min(1, len(subtrees)) >= 2**bits:
            inner = subtrees.pop() if subtrees else None
            taken = [leaves.pop() for _ in range(2**bits - (inner is not None))]
            levels.setdefault(depth - bits, []).append(_field(bits, taken, inner, model, depth == bits))
    while leaves or subtrees:
        if leaves:
            first = leaves.pop()
            inner = subtrees.pop() if subtrees else None
            taken = [first] if inner is not None else [first, leaves.pop()]
            parent = _field(1, taken, inner, model, depth == 1)
        else:
            parent = _split(subtrees.pop(), subtrees.pop(), model, depth == 1)
        levels.setdefault(depth - 1, []).append(parent)


def _field(bits: int, leaves: Sequence[_Item], inner: _Item | None, model: CostModel, root: bool) -> _Item:
    count = sum(item.count for item in leaves) + (inner.count if inner else 0)
    escape = inner is not None
    own = model.root(bits, escape, is_split=False) if root else model.sparse_list(bits, count, escape)
    symbols = tuple(item.symbol for item in leaves if item.symbol is not None)
    return _Item(count, own + (inner.cost if inner else 0.0), node=Field(bits, symbols, inner.node if inner else None))


def _split(left: _Item, right: _Item, model: CostModel, root: bool) -> _Item:
    assert left.node is not None and right.node is not None
    count = left.count + right.count
    own = model.root(1, escape=False, is_split=True) if root else model.split(count)
    return _Item(count, own + left.cost + right.cost, node=Split(left.node, right.node))
