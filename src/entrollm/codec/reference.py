"""The codec in plain Python, one symbol at a time. Every fast path is tested against it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from entrollm.errors import CorruptStreamError
from entrollm.format.blocks import Blocks, padded
from entrollm.format.code import RAW_BITS, Code, Field, Leaf, Node, Split, listed_symbols

_VECTOR = 64


def encode_block(code: Code, symbols: Sequence[int]) -> tuple[bytes, bytes]:
    """Encode one block.

    Args:
        code: the code.
        symbols: all in the code; their number is a multiple of 64.
    Returns:
        the dense and the sparse bytes of the block.
    Raises:
        ValueError: a symbol is not in the code.
    """
    keep = ~((1 << code.low_bits) - 1)
    high = [symbol & keep for symbol in symbols]
    for symbol in sorted(set(high)):
        if code_bits(code.tree, symbol) is None:
            raise ValueError(f"symbol {symbol} is not in the code")
    dense = b""
    sparse = b""
    children: list[list[int]] = []
    if not isinstance(code.tree, Leaf):
        fields, children = _fields(code.tree, high)
        dense += _pack_dense(fields, _width(code.tree))
    if children:
        sparse += len(children[0]).to_bytes(2, "little")
        for child, members in zip(_children(code.tree), children, strict=True):
            sparse += _encode_list(child, members)
    dense += _pack_dense([symbol & ~keep for symbol in symbols], code.low_bits)
    return dense, sparse


def decode_block(code: Code, dense: bytes, sparse: bytes, count: int) -> list[int]:
    """Decode one block of `count` symbols; undoes `encode_block`.

    Raises:
        CorruptStreamError: the streams do not hold exactly `count` symbols.
    """
    tree = code.tree
    root_bytes = _dense_bytes(count, _width(tree))
    fields = _unpack_dense(dense[:root_bytes], count, _width(tree))
    low = _unpack_dense(dense[root_bytes:], count, code.low_bits)
    lists: list[Iterable[int]] = []
    end = 0
    children = _children(tree)
    if children:
        first = int.from_bytes(sparse[:2], "little")
        end = 2
        if first > count:
            raise CorruptStreamError(f"a list of {first} symbols in a block of {count}")
        for child, length in zip(children, (first, count - first), strict=False):
            members, end = _decode_list(child, sparse, end, length)
            lists.append(members)
    if end != len(sparse):
        raise CorruptStreamError(f"the block has {len(sparse)} sparse bytes, its lists {end}")
    expected = _child_lengths(tree, fields)
    if [len(list(members)) for members in lists] != expected:
        raise CorruptStreamError(f"the block's first list does not match its {expected} escapes")
    return [symbol | bits for symbol, bits in zip(_merge(tree, fields, lists), low, strict=True)]


def encode_matrix(code: Code, rows: Sequence[Sequence[int]], blocks: Blocks) -> tuple[bytes, bytes, list[int]]:
    """Encode a matrix of symbols, block by block.

    Returns:
        the dense and the sparse stream without their final padding, and the size of each block's sparse part; sizes
        are stored only if the code has lists.
    """
    width = padded(len(rows[0]))
    padding = padding_symbol(code)
    dense = sparse = b""
    sizes = []
    for first in range(0, len(rows), blocks.rows):
        for begin in range(0, width, blocks.columns):
            end = min(begin + blocks.columns, width)
            symbols: list[int] = []
            for row in rows[first : first + blocks.rows]:
                part = list(row[begin:end])
                symbols += part + [padding] * (end - begin - len(part))
            block = encode_block(code, symbols)
            dense += block[0]
            sparse += block[1]
            sizes.append(len(block[1]))
    return dense, sparse, sizes


def decode_matrix(
    code: Code, shape: tuple[int, int], blocks: Blocks, dense: bytes, sparse: bytes, sizes: Sequence[int]
) -> list[list[int]]:
    """Decode a matrix; undoes `encode_matrix`. The streams may end in padding.

    Raises:
        CorruptStreamError: a block does not hold exactly its symbols.
    """
    rows, columns = shape
    width = padded(columns)
    matrix: list[list[int]] = [[] for _ in range(rows)]
    dense_at = sparse_at = block = 0
    for first in range(0, rows, blocks.rows):
        members = matrix[first : first + blocks.rows]
        for begin in range(0, width, blocks.columns):
            part = min(blocks.columns, width - begin)
            count = part * len(members)
            dense_end = dense_at + _dense_bytes(count, _width(code.tree)) + _dense_bytes(count, code.low_bits)
            sparse_end = sparse_at + (sizes[block] if sizes else 0)
            symbols = decode_block(code, dense[dense_at:dense_end], sparse[sparse_at:sparse_end], count)
            for i, row in enumerate(members):
                row += symbols[i * part : (i + 1) * part][: columns - begin]
            dense_at, sparse_at, block = dense_end, sparse_end, block + 1
    return matrix


def divide_word(word: int, bits: int) -> tuple[int, int]:
    """The symbol and the low byte of a lossless word of 8 or 16 bits; the low byte of 8 bits is 0."""
    rotated = (word << 1 | word >> bits - 1) & (1 << bits) - 1
    return (rotated, 0) if bits == 8 else (rotated >> 8, rotated & 0xFF)


def join_word(symbol: int, low: int, bits: int) -> int:
    """Undo `divide_word`."""
    rotated = symbol if bits == 8 else symbol << 8 | low
    return rotated >> 1 | (rotated & 1) << bits - 1


def code_bits(node: Node, symbol: int) -> int | None:
    """The length of a symbol's code below `node` in bits; None if it has no code there."""
    if isinstance(node, Leaf):
        return 0 if symbol == node.symbol else None
    (field,), lists = _fields(node, [symbol])
    for child, members in zip(_children(node), lists, strict=True):
        if members:
            below = code_bits(child, symbol)
            return None if below is None else _width(node) + below
    named = node.bits == RAW_BITS or node.symbols[field] == symbol if isinstance(node, Field) else False
    return _width(node) if named else None


def padding_symbol(code: Code) -> int:
    """The symbol that pads rows to a multiple of 64: the smallest of those with the shortest code."""
    lengths = [
        (bits, symbol)
        for symbol in range(0, 256, 1 << code.low_bits)
        if (bits := code_bits(code.tree, symbol)) is not None
    ]
    return min(lengths)[1]


def _width(node: Node) -> int:
    return 0 if isinstance(node, Leaf) else 1 if isinstance(node, Split) else node.bits


def _children(node: Node) -> list[Node]:
    if isinstance(node, Split):
        return [node.left, node.right]
    return [node.escape] if isinstance(node, Field) and node.escape is not None else []


def _has_raw(node: Node) -> bool:
    return _width(node) == RAW_BITS or any(_has_raw(child) for child in _children(node))


def _fields(node: Field | Split, symbols: Sequence[int]) -> tuple[list[int], list[list[int]]]:
    """The field of each symbol at `node`, and the symbols that pass to each child."""
    if isinstance(node, Split):
        left, right = listed_symbols(node.left), listed_symbols(node.right)
        rest = 0 if _has_raw(node.left) else 1
        fields = [0 if symbol in left else 1 if symbol in right else rest for symbol in symbols]
        return fields, [[s for s, f in zip(symbols, fields, strict=True) if f == side] for side in (0, 1)]
    if node.bits == RAW_BITS:
        return list(symbols), []
    escape = 2**node.bits - 1
    fields = [node.symbols.index(symbol) if symbol in node.symbols else escape for symbol in symbols]
    if node.escape is None:
        return fields, []
    return fields, [[s for s, f in zip(symbols, fields, strict=True) if f == escape]]


def _child_lengths(node: Node, fields: Sequence[int]) -> list[int]:
    if isinstance(node, Split):
        return [fields.count(0), fields.count(1)]
    return [fields.count(2**node.bits - 1)] if isinstance(node, Field) and node.escape is not None else []


def _merge(node: Node, fields: Sequence[int], lists: Sequence[Iterable[int]]) -> list[int]:
    if isinstance(node, Leaf):
        return [node.symbol] * len(fields)
    queues = [iter(members) for members in lists]
    if isinstance(node, Split):
        return [next(queues[field]) for field in fields]
    if node.bits == RAW_BITS:
        return list(fields)
    escape = 2**node.bits - 1
    return [next(queues[0]) if queues and f == escape else node.symbols[f] for f in fields]


def _encode_list(node: Node, symbols: Sequence[int]) -> bytes:
    assert not isinstance(node, Leaf)
    fields, children = _fields(node, symbols)
    own = bytes(fields) if _width(node) == RAW_BITS else _pack_planes(fields, _width(node))
    return own + b"".join(_encode_list(c, members) for c, members in zip(_children(node), children, strict=True))


def _decode_list(node: Node, sparse: bytes, at: int, count: int) -> tuple[list[int], int]:
    width = _width(node)
    size = count if width == RAW_BITS else width * (-(-count // 8))
    if at + size > len(sparse):
        raise CorruptStreamError("the block's sparse part ends early")
    stored = sparse[at : at + size]
    fields = list(stored) if width == RAW_BITS else _unpack_planes(stored, count, width)
    at += size
    lists: list[Iterable[int]] = []
    for child, length in zip(_children(node), _child_lengths(node, fields), strict=True):
        members, at = _decode_list(child, sparse, at, length)
        lists.append(members)
    return _merge(node, fields, lists), at


def _pack_planes(fields: Sequence[int], width: int) -> bytes:
    plane_bytes = -(-len(fields) // 8)
    out = bytearray(width * plane_bytes)
    for i, field in enumerate(fields):
        for bit in range(width):
            out[bit * plane_bytes + i // 8] |= (field >> bit & 1) << i % 8
    return bytes(out)


def _unpack_planes(stored: bytes, count: int, width: int) -> list[int]:
    plane_bytes = -(-count // 8)
    return [sum((stored[bit * plane_bytes + i // 8] >> i % 8 & 1) << bit for bit in range(width)) for i in range(count)]


def _sub_fields(width: int) -> list[tuple[int, int]]:
    """(bits, shift) of the sub-fields of a dense field of `width` bits, most significant first."""
    parts = []
    for bits in (4, 2, 1):
        if width & bits:
            parts.append((bits, width % bits))
    return parts


def _dense_bytes(count: int, width: int) -> int:
    if width == RAW_BITS:
        return count
    return sum(
        count // 8 if bits == 1 else -(-count // (_VECTOR * 8 // bits)) * _VECTOR for bits, _ in _sub_fields(width)
    )


def _pack_dense(fields: Sequence[int], width: int) -> bytes:
    if width == RAW_BITS:
        return bytes(fields)
    out = b""
    for bits, shift in _sub_fields(width):
        part = [field >> shift & (2**bits - 1) for field in fields]
        if bits == 1:
            out += _pack_planes(part, 1)
            continue
        groups = bytearray(_dense_bytes(len(fields), bits))
        for i, value in enumerate(part):
            vector, lane = divmod(i, _VECTOR)
            group, slot = divmod(vector, 8 // bits)
            groups[group * _VECTOR + lane] |= value << slot * bits
        out += bytes(groups)
    return out


def _unpack_dense(stored: bytes, count: int, width: int) -> list[int]:
    if width == RAW_BITS:
        return list(stored[:count])
    fields = [0] * count
    at = 0
    for bits, shift in _sub_fields(width):
        size = _dense_bytes(count, bits)
        part = stored[at : at + size]
        at += size
        for i in range(count):
            if bits == 1:
                value = part[i // 8] >> i % 8 & 1
            else:
                vector, lane = divmod(i, _VECTOR)
                group, slot = divmod(vector, 8 // bits)
                value = part[group * _VECTOR + lane] >> slot * bits & (2**bits - 1)
            fields[i] |= value << shift
    return fields


def encode_flat(
    rows: Sequence[Sequence[int]], segment_rows: int, windows: Sequence[tuple[int, int]]
) -> tuple[bytes, bytes, list[int]]:
    """Encode a matrix of symbols as flat fields and patches.

    Args:
        rows: the symbols.
        segment_rows: rows of a segment.
        windows: the width of the fields of each segment, and the symbol of field 0.
    Returns:
        the fields and the patches without their final padding, and the bytes of each row's patches.
    """
    fields, patches, sizes = b"", b"", []
    for i, row in enumerate(rows):
        bits, base = windows[i // segment_rows]
        largest = base + 2**bits - 1
        inside = [min(max(symbol, base), largest) for symbol in row]
        inside += [base] * (padded(len(row)) - len(row))
        for begin in range(0, len(inside), _VECTOR):
            fields += _pack_chunk([symbol - base for symbol in inside[begin : begin + _VECTOR]], bits)
        words = _patch_words([symbol - near for symbol, near in zip(row, inside, strict=False)])
        patches += b"".join(word.to_bytes(2, "little") for word in words)
        sizes.append(2 * len(words))
    return fields, patches, sizes


def decode_flat(
    shape: tuple[int, int],
    segment_rows: int,
    windows: Sequence[tuple[int, int]],
    fields: bytes,
    patches: bytes,
    sizes: Sequence[int],
) -> list[list[int]]:
    """Decode a flat matrix; undoes `encode_flat`. The streams may end in padding.

    Raises:
        CorruptStreamError: a patch lies outside of its row.
    """
    rows, columns = shape
    matrix = []
    field_at = patch_at = 0
    for i in range(rows):
        bits, base = windows[i // segment_rows]
        row: list[int] = []
        for _ in range(padded(columns) // _VECTOR):
            row += [base + field for field in _unpack_chunk(fields[field_at : field_at + 8 * bits], bits)]
            field_at += 8 * bits
        column = 0
        for _ in range(sizes[i] // 2 if sizes else 0):
            word = int.from_bytes(patches[patch_at : patch_at + 2], "little")
            column += word & 0xFFF
            if column >= columns:
                raise CorruptStreamError(f"row {i} of {columns} columns has a patch in column {column}")
            row[column] += (word >> 12 ^ 8) - 8
            patch_at += 2
        matrix.append(row[:columns])
    return matrix


def _patch_words(differences: Sequence[int]) -> list[int]:
    words, last = [], 0
    for column, difference in enumerate(differences):
        while difference:
            gap = column - last
            part = 0 if gap > 0xFFF else min(max(difference, -8), 7)
            words.append(min(gap, 0xFFF) | (part & 15) << 12)
            last += min(gap, 0xFFF)
            difference -= part
    return words


def _pack_chunk(fields: Sequence[int], bits: int) -> bytes:
    """64 fields: their lowest four bits, then two, then one, as far as the width has them."""
    if bits == RAW_BITS:
        return bytes(fields)
    out = b""
    for part in (4, 2, 1):
        if bits & part:
            shift, octets = bits & ~(2 * part - 1), bytearray(8 * part)
            for column, field in enumerate(fields):
                octets[column % (8 * part)] |= (field >> shift & (2**part - 1)) << column // (8 * part) * part
            out += bytes(octets)
    return out


def _unpack_chunk(stored: bytes, bits: int) -> list[int]:
    if bits == RAW_BITS:
        return list(stored)
    fields = [0] * _VECTOR
    at = 0
    for part in (4, 2, 1):
        if bits & part:
            shift = bits & ~(2 * part - 1)
            for column in range(_VECTOR):
                octet = stored[at + column % (8 * part)]
                fields[column] |= (octet >> column // (8 * part) * part & (2**part - 1)) << shift
            at += 8 * part
    return fields


def half_steps_of_row(symbols: Sequence[int]) -> list[int]:
    """What the symbols of a whole row stand for with a trellis, in half steps.

    m[0] = m[1] = 0 and m[j + 1] = (k[j] mod 2) xor m[j - 1]; a symbol k[j] stands for 2 k[j] + m[j], modulo 256.
    """
    steps = []
    before = here = 0  # m of the column before this one and of this one
    for column, symbol in enumerate(symbols):
        steps.append((2 * symbol + here) % 256)
        before, here = here, symbol % 2 ^ before if column else 0
    return steps
