"""Prefix codes as trees of fixed-width fields: in Python, in JSON, and as the bytes that native code runs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeAlias

from entrollm.errors import FormatError
from entrollm.format.json_fields import is_int

MAX_FIELD_BITS = 6
RAW_BITS = 8
MAX_LOW_BITS = 6
MAX_NODES = 511
MAX_DEPTH = 64
_LEAF, _FIELD, _SPLIT = 0, 1, 2


@dataclass(frozen=True, slots=True)
class Leaf:
    """A code of one symbol, which takes no bits. It may stand only at the root."""

    symbol: int


@dataclass(frozen=True, slots=True)
class Field:
    """A node that stores one field of `bits` bits for each symbol of its list.

    Field value i means `symbols[i]`. With an `escape` subtree, the value of all ones means that the subtree codes the
    symbol. A field of 8 bits is raw: it lists no symbols, because its values are the symbols.
    """

    bits: int
    symbols: tuple[int, ...]
    escape: Node | None = None


@dataclass(frozen=True, slots=True)
class Split:
    """A node that stores one bit for each symbol of its list: 0 sends it to `left`, 1 to `right`. Neither is a leaf."""

    left: Node
    right: Node


Node: TypeAlias = Leaf | Field | Split


def listed_symbols(node: Node) -> frozenset[int]:
    """The symbols that a subtree lists. Its raw field, if it has one, codes all others."""
    if isinstance(node, Leaf):
        return frozenset((node.symbol,))
    if isinstance(node, Split):
        return listed_symbols(node.left) | listed_symbols(node.right)
    own = frozenset(node.symbols)
    return own if node.escape is None else own | listed_symbols(node.escape)


@dataclass(frozen=True, slots=True)
class Code:
    """A prefix code for the symbols 0 to 255.

    Attributes:
        tree: codes the symbols with their `low_bits` lowest bits cleared.
        low_bits: how many low bits of each symbol are stored as they are.
    """

    tree: Node
    low_bits: int = 0

    def program(self) -> bytes:
        """The tree in preorder, as the bytes that native code validates and runs."""
        return bytes(_program(self.tree))


def _program(node: Node) -> list[int]:
    if isinstance(node, Leaf):
        return [_LEAF, node.symbol]
    if isinstance(node, Split):
        return [_SPLIT, *_program(node.left), *_program(node.right)]
    escape = [] if node.escape is None else _program(node.escape)
    return [_FIELD, node.bits, node.escape is not None, *node.symbols, *escape]


def node_to_json(node: Node) -> Any:
    """The JSON form of a tree."""
    if isinstance(node, Leaf):
        return node.symbol
    if isinstance(node, Split):
        return {"split": [node_to_json(node.left), node_to_json(node.right)]}
    fields: dict[str, Any] = {"bits": node.bits}
    if node.symbols:
        fields["symbols"] = list(node.symbols)
    if node.escape is not None:
        fields["escape"] = node_to_json(node.escape)
    return fields


def tree_from_json(value: Any, name: str) -> Node:
    """Parse and check the JSON form of a tree.

    Raises:
        FormatError: the value is not a code tree; the message begins with `name`.
    """
    return _node_from_json(value, name, 0)[0]


def _node_from_json(value: Any, name: str, depth: int, nodes: int = 0) -> tuple[Node, int]:
    """The node, and the number of nodes that have been read so far."""
    nodes += 1
    if depth > MAX_DEPTH or nodes > MAX_NODES:
        raise FormatError(f"{name}: the code tree is too large")
    if is_int(value, 0, 255) and depth == 0:
        return Leaf(value), nodes
    if not isinstance(value, dict):
        raise FormatError(f"{name}: a node of the code tree is {value!r:.80}")
    if unknown := sorted(value.keys() - ({"split"} if "split" in value else {"bits", "symbols", "escape"})):
        raise FormatError(f"{name}: a node of the code tree has the unexpected key {unknown[0]!r:.80}")
    if "split" in value:
        children = value["split"]
        if not isinstance(children, list) or len(children) != 2:
            raise FormatError(f"{name}: a split of the code tree needs two children")
        left, nodes = _node_from_json(children[0], name, depth + 1, nodes)
        right, nodes = _node_from_json(children[1], name, depth + 1, nodes)
        return Split(left, right), nodes
    bits = value.get("bits")
    if not (isinstance(bits, int) and (is_int(bits, 1, MAX_FIELD_BITS) or bits == RAW_BITS)):
        raise FormatError(f"{name}: a field of the code tree has {bits!r:.80} bits, expected 1 to 6, or 8")
    escape: Node | None = None
    if "escape" in value:
        if bits == RAW_BITS:
            raise FormatError(f"{name}: a raw field of the code tree cannot have an escape")
        escape, nodes = _node_from_json(value["escape"], name, depth + 1, nodes)
    symbols = value.get("symbols", [])
    expected = 0 if bits == RAW_BITS else 2**bits - (escape is not None)
    if not isinstance(symbols, list) or len(symbols) != expected or not all(is_int(s, 0, 255) for s in symbols):
        raise FormatError(f"{name}: a {bits}-bit field of the code tree needs {expected} symbols from 0 to 255")
    return Field(bits, tuple(symbols), escape), nodes
