"""Choose the code of a matrix: its tree, and the number of low bits that stay raw."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal

from entrollm.codec.cost import MACHINES, CostModel, Processor
from entrollm.codec.flat import SEGMENT_ROWS, best_window
from entrollm.codec.huffman import entropy_bits, huffman_bits
from entrollm.codec.shapes import Cascades, Ranked, huffman_shape, rank
from entrollm.format.code import MAX_FIELD_BITS, MAX_LOW_BITS, RAW_BITS, Code, Field, Leaf, Node, Split, listed_symbols
from entrollm.format.flat import AnyCode, FlatCode

Prefer = Literal["size", "speed", "fixed"]

# What one cycle per 64 weights is worth, in bits per weight. A core that streams 4 bytes a cycle spends two cycles on
# one bit of 64 weights. "size" minimizes bits, and time only breaks ties.
_BITS_PER_CYCLE = {"size": 0.0004, "speed": 0.12}
# "speed" promises at most this many bits per weight above the Huffman optimum. The margin is the accuracy of the
# estimated padding.
_SPEED_EXCESS_BITS = 0.25
# Codes of lossless words take at most this share of a weight more than the entropy, so that the file with everything
# else stays within 1 %. Within it, the fastest code is found by trying what a cycle is worth.
_LOSSLESS_EXCESS = 0.008
_LOSSLESS_PRICES = (0.12, 0.08, 0.04, 0.02, 0.01)
# AVX2 and NEON take three to five times as long for a cascade as for flat fields, so that these may cost more bits.
# AVX-512 decodes cascades as fast as memory delivers them to several cores.
_FLAT_EXCESS_BITS = 1.0
_FLAT_PROCESSORS: frozenset[Processor] = frozenset(("x86", "arm"))
_MARGIN_BITS = 0.01


def choose_code(
    counts: Sequence[int],
    blocks: int,
    prefer: Prefer = "size",
    processor: Processor = "x86",
    *,
    can_be_flat: bool = True,
) -> AnyCode:
    """The best code for a histogram of symbols.

    Args:
        counts: 256 entries, how often each symbol occurs, without padding.
        blocks: the number of blocks of the matrix; each has a small fixed cost.
        prefer: "size" for the fewest bits, "speed" for the fastest product within 0.25 bits per weight of the
            Huffman optimum, or within one bit with a flat code, "fixed" for fixed-width integers, for comparison with
            entropy coding.
        processor: what will run the model.
        can_be_flat: whether flat codes are an option, which matrices with group scales do not have.
    Raises:
        ValueError: `prefer` or `processor` is unknown, or the histogram is empty.
    """
    if prefer != "fixed" and prefer not in _BITS_PER_CYCLE:
        raise ValueError(f"prefer must be 'size', 'speed' or 'fixed', not {prefer!r}")
    if processor not in MACHINES:
        raise ValueError(f"processor must be 'x86', 'arm' or 'avx512', not {processor!r}")
    weights = sum(counts)
    if weights == 0:
        raise ValueError("the histogram is empty")
    if prefer == "fixed":
        return Code(_fixed_width(max(s for s, c in enumerate(counts) if c)))
    symbols = [s for s, c in enumerate(counts) if c]
    if len(symbols) == 1:
        return Code(Leaf(symbols[0]))
    model = CostModel(_BITS_PER_CYCLE[prefer], weights, blocks, MACHINES[processor])
    if prefer == "size":
        return min(_candidates(counts, model), key=lambda candidate: candidate[0])[1]
    optimum = huffman_bits(counts)
    may_be_flat = can_be_flat and is_flat_preferred(prefer, processor)
    if may_be_flat and best_window(counts)[1] <= weights * (optimum + _FLAT_EXCESS_BITS):
        return FlatCode(SEGMENT_ROWS)
    limit = optimum + _SPEED_EXCESS_BITS - _MARGIN_BITS
    candidates = list(_candidates(counts, model))
    within = [c for c in candidates if stored_bits(c[1], counts, blocks) <= limit]
    if within:
        return min(within, key=lambda candidate: candidate[0])[1]
    return min((c[1] for c in candidates), key=lambda code: stored_bits(code, counts, blocks))


def choose_lossless_code(
    counts: Sequence[int], blocks: int, raw_bits: int, prefer: Prefer = "size", processor: Processor = "x86"
) -> AnyCode:
    """The best code for the symbols of lossless words.

    Args:
        counts, blocks, processor: as `choose_code` takes them.
        raw_bits: bits of a weight that are not coded, 0 or 8.
        prefer: "size" for the fastest code within 0.8 % of the entropy of a weight, or the smallest where none is;
            the others as `choose_code` has them.
    Raises:
        ValueError: as `choose_code`.
    """
    smallest = choose_code(counts, blocks, prefer, processor)
    if prefer != "size" or not (isinstance(smallest, Code) and isinstance(smallest.tree, Field | Split)):
        return smallest
    weights = sum(counts)
    entropy = entropy_bits(counts)
    limit = entropy + _LOSSLESS_EXCESS * (entropy + raw_bits)
    for price in _LOSSLESS_PRICES:
        model = CostModel(price, weights, blocks, MACHINES[processor])
        code = min(_candidates(counts, model), key=lambda candidate: candidate[0])[1]
        if stored_bits(code, counts, blocks) <= limit:
            return code
    return smallest


def is_flat_preferred(prefer: Prefer, processor: Processor) -> bool:
    """Whether a processor is to multiply as fast as it can, and does that with flat codes."""
    return prefer == "speed" and processor in _FLAT_PROCESSORS


def _fixed_width(largest: int) -> Field:
    bits = max(1, largest.bit_length())
    return Field(bits, tuple(range(2**bits))) if bits <= MAX_FIELD_BITS else Field(RAW_BITS, ())


def stored_bits(code: AnyCode, counts: Sequence[int], blocks: int) -> float:
    """Predict the stored bits per weight of a matrix with this histogram, block headers and padding included."""
    weights = sum(counts)
    if isinstance(code, FlatCode):
        return best_window(counts)[1] / weights
    model = CostModel(0.0, weights, blocks)
    high = _high_histogram(counts, code.low_bits)
    listed = listed_symbols(code.tree)
    rest = sum(c for s, c in enumerate(high) if s not in listed)
    bits = model.low(code.low_bits) + _tree_bits(code.tree, high, rest, model, root=True)[0]
    return bits / weights


def _candidates(counts: Sequence[int], model: CostModel) -> Iterator[tuple[float, Code]]:
    distinct = sum(1 for c in counts if c)
    # Raw low bits pay only for large alphabets, whose low bits are close to uniform.
    most = max(0, min(MAX_LOW_BITS, distinct.bit_length() - 3))
    for low_bits in range(most + 1):
        ranked = rank(_high_histogram(counts, low_bits))
        if len(ranked.symbols) == 1:
            continue
        low_cost = model.low(low_bits)
        cascades = Cascades(ranked, model)
        cost, tree = cascades.root()
        yield cost + low_cost, Code(tree, low_bits)
        for kept in _kept_choices(ranked):
            cost, tree = huffman_shape(ranked, kept, cascades, model)
            yield cost + low_cost, Code(tree, low_bits)


def _kept_choices(ranked: Ranked) -> list[int]:
    size = len(ranked.symbols)
    if size <= 24:
        return list(range(1, size + 1))
    return [*(n for n in (4, 8, 12, 16, 22, 30, 44, 64, 96, 144) if n < size), size]


def _high_histogram(counts: Sequence[int], low_bits: int) -> list[int]:
    high = [0] * 256
    for symbol, count in enumerate(counts):
        high[symbol >> low_bits << low_bits] += count
    return high


def _tree_bits(node: Node, counts: Sequence[int], rest: int, model: CostModel, root: bool) -> tuple[float, int]:
    """Stored bits at and below `node`, and the length of its list; no field lists `rest` of the symbols."""
    if isinstance(node, Leaf):
        return 0.0, counts[node.symbol]
    if isinstance(node, Split):
        left_bits, left = _tree_bits(node.left, counts, rest, model, False)
        right_bits, right = _tree_bits(node.right, counts, rest, model, False)
        own = model.root(1, False, True) if root else model.split(left + right)
        return own + left_bits + right_bits, left + right
    count = sum(counts[symbol] for symbol in set(node.symbols)) if node.symbols else rest
    below = 0.0
    escape = node.escape is not None
    if node.escape is not None:
        below, escaped = _tree_bits(node.escape, counts, rest, model, False)
        count += escaped
    own = model.root(node.bits, escape, False) if root else model.sparse_list(node.bits, count, escape)
    return own + below, count
