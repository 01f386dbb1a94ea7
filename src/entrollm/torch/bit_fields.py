"""Decode the lists of many coded blocks at once, in plain torch operations.

The lists that many blocks have for one node form a single flat tensor, block after block. The symbols that the node
passes to a child are then a mask over that tensor, and the child's flat tensor fills the mask in order, whatever the
lengths of the single lists.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from entrollm.format.code import RAW_BITS, Field, Leaf, Node, Split

_VECTOR = 64

__all__ = ["DenseFields", "Node", "Stream", "children", "decode_lists", "dense_bytes", "width_of"]


def width_of(node: Node) -> int:
    """Bits of each field of a node."""
    return 0 if isinstance(node, Leaf) else 1 if isinstance(node, Split) else node.bits


def children(node: Node) -> tuple[Node, ...]:
    """The nodes that a node passes symbols to."""
    if isinstance(node, Split):
        return node.left, node.right
    return (node.escape,) if isinstance(node, Field) and node.escape is not None else ()


def dense_bytes(count: int, width: int) -> int:
    """Bytes that `count` fields of `width` bits take in the dense layout."""
    if width == RAW_BITS:
        return count
    return sum(_area_bytes(count, bits) for bits in (4, 2, 1) if width & bits)


def _area_bytes(count: int, bits: int) -> int:
    return count // 8 if bits == 1 else -(-count // (_VECTOR * 8 // bits)) * _VECTOR


@dataclass(frozen=True)
class DenseFields:
    """Fields in the dense layout.

    Attributes:
        stream: uint8, the whole dense stream, or `None` if fields have no bits.
        starts: int64, shape (blocks,), where each block's fields begin, in bytes.
        count: fields of each block.
        width: bits of each field.
    """

    stream: Tensor | None
    starts: Tensor
    count: int
    width: int

    def values(self) -> Tensor:
        """Read the fields: uint8 (blocks, count)."""
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
        offsets = torch.arange(at, at + size, device=self.starts.device)
        return self.stream[self.starts[:, None] + offsets]


@dataclass
class Stream:
    """The sparse parts of some blocks, and how far each has been read.

    Attributes:
        data: uint8, the whole sparse stream.
        starts, sizes: int64, shape (blocks,), where each block's part begins and how long it is, in bytes.
        used: int64, shape (blocks,), bytes of each part that have been read.
    """

    data: Tensor
    starts: Tensor
    sizes: Tensor

    def __post_init__(self) -> None:
        self.used = torch.zeros_like(self.sizes)

    def first_lengths(self) -> Tensor:
        """Read the 16-bit length at the front of each part."""
        lengths = self.data[self.starts].to(torch.int64) | self.data[self.starts + 1].to(torch.int64) << 8
        self.used += 2
        return lengths

    def fields(self, lengths: Tensor, width: int) -> tuple[Tensor, Tensor] | None:
        """Read the next list of each block, in the sparse layout.

        Args:
            lengths: int64, shape (blocks,), fields in each list.
            width: bits of each field.
        Returns:
            uint8 fields, list after list, and the block of each field; `None` if a list is longer than its block.
        """
        plane = (lengths + 7) // 8
        size = lengths if width == RAW_BITS else width * plane
        if not bool((self.used + size <= self.sizes).all()):
            return None
        block = torch.repeat_interleave(torch.arange(len(lengths), device=lengths.device), lengths)
        index = torch.arange(len(block), device=lengths.device) - (torch.cumsum(lengths, 0) - lengths)[block]
        begin = (self.starts + self.used)[block]
        self.used += size
        if width == RAW_BITS:
            return self.data[begin + index], block
        fields = torch.zeros(len(block), dtype=torch.uint8, device=lengths.device)
        shift = (index % 8).to(torch.uint8)
        begin += index // 8
        for bit in range(width):
            fields |= (self.data[begin + bit * plane[block]] >> shift & 1) << bit
        return fields, block


def decode_lists(tree: Node, root: DenseFields, sparse: Stream | None) -> Tensor | None:
    """Decode symbols of blocks, without their low bits.

    Args:
        tree: the code.
        root: the fields of its root.
        sparse: the lists below the root, or `None` if it has no children.
    Returns:
        uint8 (blocks, count), or `None` if a block does not hold exactly its lists.
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
        passed = torch.zeros_like(lengths).index_add_(0, block, mask.to(lengths.dtype))
        members = _decode_list(child, sparse, passed)
        if members is None:
            return None
        lists.append(members)
    return _merge(node, fields, lists)


def _masks(node: Node, fields: Tensor) -> list[Tensor]:
    """For each child, which fields it gets the symbols of."""
    if isinstance(node, Split):
        return [fields == 0, fields == 1]
    return [fields == (1 << node.bits) - 1] if isinstance(node, Field) and node.escape is not None else []


def _merge(node: Node, fields: Tensor, lists: list[Tensor]) -> Tensor:
    """Merge the symbols that a node's own fields name with those of its children's lists."""
    if isinstance(node, Field) and node.bits == RAW_BITS:
        return fields
    symbols = torch.zeros_like(fields)
    if isinstance(node, Field):
        named = torch.tensor([*node.symbols, 0], dtype=torch.uint8, device=fields.device)
        symbols = named[fields.to(torch.int32)]
    for mask, members in zip(_masks(node, fields), lists, strict=True):
        symbols = symbols.masked_scatter(mask, members)
    return symbols
