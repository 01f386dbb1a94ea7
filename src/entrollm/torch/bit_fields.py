"""The lists of coded blocks in plain torch operations: many blocks at once, their lists end to end.

The lists that many blocks have of one node are one flat tensor, block after block. What the node hands to a child is
then a mask over that tensor, and the child's flat tensor fills the mask in order, whatever the lengths in between.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from entrollm.format.code import RAW_BITS, Field, Leaf, Node, Split

_VECTOR = 64

__all__ = ["DenseFields", "Node", "Stream", "children", "decode_lists", "dense_bytes", "width_of"]


def width_of(node: Node) -> int:
    """Bits of a field of the node."""
    return 0 if isinstance(node, Leaf) else 1 if isinstance(node, Split) else node.bits


def children(node: Node) -> tuple[Node, ...]:
    """The nodes that a node hands symbols to."""
    if isinstance(node, Split):
        return node.left, node.right
    return (node.escape,) if isinstance(node, Field) and node.escape is not None else ()


def dense_bytes(count: int, width: int) -> int:
    """Bytes that `count` fields take in the dense layout."""
    if width == RAW_BITS:
        return count
    return sum(_area_bytes(count, bits) for bits in (4, 2, 1) if width & bits)


def _area_bytes(count: int, bits: int) -> int:
    return count // 8 if bits == 1 else -(-count // (_VECTOR * 8 // bits)) * _VECTOR


@dataclass(frozen=True)
class DenseFields:
    """Fields in the dense layout: `count` of each block, `width` bits wide, from the blocks' starts on."""

    stream: Tensor | None
    starts: Tensor
    count: int
    width: int

    def values(self) -> Tensor:
        """The fields: uint8 (blocks, count)."""
        blocks, device = len(self.starts), self.starts.device
        if self.width == RAW_BITS:
            return self._bytes(0, self.count)
        fields = torch.zeros((blocks, self.count), dtype=torch.uint8, device=device)
        at = 0
        for bits in (4, 2, 1):
            if not self.width & bits:
                continue
            size = _area_bytes(self.count, bits)
            # Neighbouring fields lie in neighbouring bytes, a vector of 64 at a time; single bits in the same byte.
            lanes = 1 if bits == 1 else _VECTOR
            area = self._bytes(at, size).reshape(blocks, size // lanes, 1, lanes)
            shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=device)[:, None]
            part = (area >> shifts & (1 << bits) - 1).reshape(blocks, -1)[:, : self.count]
            fields |= part << self.width % bits
            at += size
        return fields

    def _bytes(self, at: int, size: int) -> Tensor:
        assert self.stream is not None
        place = torch.arange(at, at + size, device=self.starts.device)
        return self.stream[self.starts[:, None] + place]


@dataclass
class Stream:
    """The sparse parts of some blocks, and how far each has been read.

    Attributes:
        data: the whole stream.
        starts, sizes: of each block's part, in bytes.
    """

    data: Tensor
    starts: Tensor
    sizes: Tensor

    def __post_init__(self) -> None:
        self.used = torch.zeros_like(self.sizes)

    def first_lengths(self) -> Tensor:
        """The 16-bit lengths at the front."""
        lengths = self.data[self.starts].to(torch.int64) | self.data[self.starts + 1].to(torch.int64) << 8
        self.used += 2
        return lengths

    def fields(self, lengths: Tensor, width: int) -> tuple[Tensor, Tensor] | None:
        """The next list of each block, in the sparse layout.

        Returns:
            uint8 fields and the block of each, end to end; None where a list does not fit its block.
        """
        plane = (lengths + 7) // 8
        size = lengths if width == RAW_BITS else width * plane
        if not bool((self.used + size <= self.sizes).all()):
            return None
        block = torch.repeat_interleave(torch.arange(len(lengths), device=lengths.device), lengths)
        place = torch.arange(len(block), device=lengths.device) - (torch.cumsum(lengths, 0) - lengths)[block]
        begin = (self.starts + self.used)[block]
        self.used += size
        if width == RAW_BITS:
            return self.data[begin + place], block
        fields = torch.zeros(len(block), dtype=torch.uint8, device=lengths.device)
        shift = (place % 8).to(torch.uint8)
        begin += place // 8
        for bit in range(width):
            fields |= (self.data[begin + bit * plane[block]] >> shift & 1) << bit
        return fields, block


def decode_lists(tree: Node, root: DenseFields, sparse: Stream | None) -> Tensor | None:
    """The high parts of the symbols of blocks: uint8 (blocks, count).

    Args:
        tree: the code.
        root: the fields of its root.
        sparse: the lists below the root; None where it has no children.
    Returns:
        the symbols, or None if a block does not hold exactly its lists.
    """
    if isinstance(tree, Leaf):
        return root.values() | tree.symbol
    fields = root.values()
    blocks, count = fields.shape
    flat = fields.reshape(-1)
    lists: list[Tensor] = []
    if sparse is not None:
        if not bool((sparse.sizes >= 2).all()):
            return None
        first = sparse.first_lengths()
        masks = _masks(tree, flat)
        expected = [mask.reshape(blocks, count).sum(dim=1) for mask in masks]
        if not bool((first == expected[0]).all()):
            return None
        for child, lengths in zip(children(tree), expected, strict=True):
            members = _decode_list(child, sparse, lengths)
            if members is None:
                return None
            lists.append(members)
        if not bool((sparse.used == sparse.sizes).all()):
            return None
    return _merge(tree, flat, lists).reshape(blocks, count)


def _decode_list(node: Node, sparse: Stream, lengths: Tensor) -> Tensor | None:
    read = sparse.fields(lengths, width_of(node))
    if read is None:
        return None
    fields, block = read
    lists = []
    for child, mask in zip(children(node), _masks(node, fields), strict=True):
        handed = torch.zeros_like(lengths).index_add_(0, block, mask.to(lengths.dtype))
        members = _decode_list(child, sparse, handed)
        if members is None:
            return None
        lists.append(members)
    return _merge(node, fields, lists)


def _masks(node: Node, fields: Tensor) -> list[Tensor]:
    """Which fields hand their symbols to each child."""
    if isinstance(node, Split):
        return [fields == 0, fields == 1]
    return [fields == (1 << node.bits) - 1] if isinstance(node, Field) and node.escape is not None else []


def _merge(node: Node, fields: Tensor, lists: list[Tensor]) -> Tensor:
    """The symbols of a node's list."""
    if isinstance(node, Field) and node.bits == RAW_BITS:
        return fields
    symbols = torch.zeros_like(fields)
    if isinstance(node, Field):
        named = torch.tensor([*node.symbols, 0], dtype=torch.uint8, device=fields.device)
        symbols = named[fields.to(torch.int32)]
    for mask, members in zip(_masks(node, fields), lists, strict=True):
        symbols = symbols.masked_scatter(mask, members)
    return symbols
