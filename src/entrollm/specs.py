"""What a compressed tensor is: its shape, code and blocks, as frozen dataclasses with a strict JSON form."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from entrollm.errors import FormatError

FORMAT_VERSION = 2
"""What is written."""
READ_VERSIONS = (1, 2)
MAX_FIELD_BITS = 6
RAW_BITS = 8
MAX_LOW_BITS = 6
MAX_NODES = 511
MAX_DEPTH = 64
MAX_AXIS = 2**31
MAX_WEIGHTS = 2**40
MAX_BLOCK_WEIGHTS = 8192
# Types that a compressed matrix may have had.
SOURCE_DTYPES = frozenset({"F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2"})
_FLOAT32_MAX = 3.4028234663852886e38
_SPEC_KEYS = frozenset(
    {"shape", "dtype", "grid", "block", "code", "low_bits", "error", "scale", "offset", "zero", "scales", "parts"}
    | {"groups", "crc32"}
)
# Arrays of scales that are stored with a matrix, the types of their elements, and how many codes an octave may have.
SCALE_ARRAYS = ("scale", "offset", "column_scale")
_SCALE_TYPES = ("F32", "BF16")
OCTAVE_CODES = (1, 2, 4, 8, 16, 32, 64)
_MAX_PART_BYTES = 2**44
# The arrays that a matrix with group scales may have, and the types of each.
_FLOAT_TYPES = ("F16", "BF16", "F32")
GROUP_ARRAY_TYPES: Mapping[str, tuple[str, ...]] = {
    "group_scale": (*_FLOAT_TYPES, "U8", "I8"),
    "group_zero": ("U8", *_FLOAT_TYPES),
    "group_minimum": (*_FLOAT_TYPES, "U8", "I8"),
    "super_scale": _FLOAT_TYPES,
    "super_minimum": _FLOAT_TYPES,
    "column_order": ("U32",),
}
_GROUP_KEYS = frozenset({"size", "super_size", "types", "arithmetic", "values", "factor"})
_LEAF, _FIELD, _SPLIT = 0, 1, 2


@dataclass(frozen=True, slots=True)
class Leaf:
    """A code of one symbol, which needs no bits; stands only at the root."""

    symbol: int


@dataclass(frozen=True, slots=True)
class Field:
    """One field of `bits` bits per symbol that passes.

    Field value i means `symbols[i]`; with an `escape` subtree the all-ones value means "decoded there". A field of
    8 bits is raw: it lists no symbols, its values are the symbols.
    """

    bits: int
    symbols: tuple[int, ...]
    escape: Node | None = None


@dataclass(frozen=True, slots=True)
class Split:
    """One bit per symbol that passes: 0 continues in `left`, 1 in `right`; neither is a leaf."""

    left: Node
    right: Node


Node: TypeAlias = Leaf | Field | Split


def listed_symbols(node: Node) -> frozenset[int]:
    """The symbols that a subtree names; any other symbol is coded by its raw field, if it has one."""
    if isinstance(node, Leaf):
        return frozenset((node.symbol,))
    if isinstance(node, Split):
        return listed_symbols(node.left) | listed_symbols(node.right)
    own = frozenset(node.symbols)
    return own if node.escape is None else own | listed_symbols(node.escape)


@dataclass(frozen=True, slots=True)
class Code:
    """A prefix code for symbols 0..255: a tree for the high bits, and `low_bits` raw bits below them.

    Symbols in the tree have their `low_bits` lowest bits clear.
    """

    tree: Node
    low_bits: int = 0

    def program(self) -> bytes:
        """The tree as preorder bytes, the form that the native code validates and runs."""
        return bytes(_program(self.tree))


@dataclass(frozen=True, slots=True)
class Blocks:
    """A block holds up to `columns` columns (a multiple of 64) of `rows` rows."""

    rows: int
    columns: int


@dataclass(frozen=True, slots=True)
class Groups:
    """The form of a matrix whose scales belong to groups of columns, as imported ones do; see docs/format.md.

    Attributes:
        size: columns of a group; the last one of a row may be cut short.
        types: the safetensors type of each stored array, by a name of GROUP_ARRAY_TYPES; there is a group_scale.
        super_size: columns that share a super_scale and a super_minimum; None where there are none.
        arithmetic: F32, or the type to which every operation is rounded.
        values: F8_E4M3 or F8_E5M2 where symbols are the bytes of that type; None where they are integers.
        factor: a float32 that multiplies all weights, last.
    """

    size: int
    types: Mapping[str, str]
    super_size: int | None = None
    arithmetic: str = "F32"
    values: str | None = None
    factor: float | None = None

    def lengths(self, rows: int, columns: int) -> dict[str, int]:
        """How many elements each stored array of a matrix has."""
        per_row = {"group": -(-columns // self.size), "super": -(-columns // (self.super_size or columns))}
        return {
            name: columns if name == "column_order" else rows * per_row[name.partition("_")[0]] for name in self.types
        }

    def to_json(self) -> dict[str, Any]:
        """The fields that are not at their defaults."""
        fields = {"size": self.size, "types": dict(self.types)}
        optional = {"super_size": self.super_size, "values": self.values, "factor": self.factor}
        if self.arithmetic != "F32":
            fields["arithmetic"] = self.arithmetic
        return fields | {key: value for key, value in optional.items() if value is not None}


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One compressed matrix: W[i, j] = (symbol[i, j] * scale[i] + offset[i]) * column_scale[j].

    Attributes:
        rows, columns: out_features and in_features.
        dtype: safetensors name of the type of the original tensor, which `export` restores.
        grid: how the scales were chosen, for people ("paper-asymmetric-4", ...).
        code, blocks: how the symbols are stored.
        scale, offset: the tensor's scale and offset; None when they are stored per row (offset may also be absent).
        relative_error: RMS quantization error over the RMS of the original weights.
        checksum: CRC-32 over the name, this spec and all stored entries of the tensor; see docs/format.md.
        zero: what stands for 0, where offset[i] = -zero * scale[i] and no offset is stored; between symbols, perhaps.
        groups: the form of group scales, which stand in place of scale, offset and column_scale; None for none.
        scales: by a name of SCALE_ARRAYS, the type of the stored array, or for bytes, how many of them make an octave:
            `scales.decode_scales` says what they mean.
        parts: bytes of the dense and sparse streams and of what follows them in the one entry that holds them; None
            where each has an entry of its own.
    """

    rows: int
    columns: int
    dtype: str
    grid: str
    code: Code
    blocks: Blocks
    scale: float | None
    offset: float | None
    relative_error: float
    checksum: int
    zero: float | None = None
    groups: Groups | None = None
    scales: Mapping[str, str | int] = field(default_factory=dict)
    parts: tuple[int, int, int] | None = None

    def to_json(self) -> str:
        """Compact JSON; floats round-trip exactly, and the checksum comes last because it covers what precedes it."""
        fields: dict[str, Any] = {
            "shape": [self.rows, self.columns],
            "dtype": self.dtype,
            "grid": self.grid,
            "block": [self.blocks.rows, self.blocks.columns],
            "code": _node_to_json(self.code.tree),
            "error": self.relative_error,
        }
        if self.code.low_bits:
            fields["low_bits"] = self.code.low_bits
        if self.scale is not None:
            fields["scale"] = self.scale
        if self.offset is not None:
            fields["offset"] = self.offset
        if self.zero is not None:
            fields["zero"] = int(self.zero) if self.zero == int(self.zero) else self.zero
        if self.groups is not None:
            fields["groups"] = self.groups.to_json()
        if self.scales:
            fields["scales"] = dict(self.scales)
        if self.parts is not None:
            fields["parts"] = list(self.parts)
        fields["crc32"] = f"{self.checksum:08x}"
        return json.dumps(fields, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str, name: str) -> TensorSpec:
        """Parse and check the JSON form.

        Args:
            text: the value stored in the safetensors metadata.
            name: the tensor's name, for error messages.
        Raises:
            FormatError: the text is not a valid spec.
        """
        fields = _parse_object(text, name)
        if unknown := sorted(fields.keys() - _SPEC_KEYS):
            raise FormatError(f"{name}: the stored spec has the unknown key {unknown[0]!r:.80}")
        reader = _SpecReader(name, fields)
        rows, columns = reader.int_pair("shape", MAX_AXIS)
        if rows * columns > MAX_WEIGHTS:
            raise FormatError(f"{name}: {rows} x {columns} weights are more than the format allows")
        block_rows, block_columns = reader.int_pair("block", MAX_BLOCK_WEIGHTS)
        dtype = reader.text("dtype")
        if dtype not in SOURCE_DTYPES:
            raise FormatError(f"{name}: dtype is {dtype!r}, expected one of {', '.join(sorted(SOURCE_DTYPES))}")
        checksum = reader.text("crc32")
        if len(checksum) != 8 or any(c not in "0123456789abcdef" for c in checksum):
            raise FormatError(f"{name}: crc32 must be 8 hex digits, found {checksum!r}")
        if not text.endswith(f',"crc32":"{checksum}"}}'):
            raise FormatError(f"{name}: crc32 must come last in the stored spec")
        relative_error = reader.number("error")
        if relative_error is None or relative_error < 0:
            raise FormatError(f"{name}: error must be a number of at least 0, found {fields.get('error')!r}")
        tree, _ = _node_from_json(reader.require("code"), name, 0)
        low_bits = reader.low_bits()
        if any(symbol % (1 << low_bits) for symbol in listed_symbols(tree)):
            raise FormatError(f"{name}: a symbol of the code tree overlaps the {low_bits} low bits")
        zero, offset = reader.zero(), reader.number("offset")
        if zero is not None and offset is not None:
            raise FormatError(f"{name}: the stored spec has both an offset and a zero")
        groups, scale = reader.groups(), reader.number("scale")
        if groups is not None and not (scale is None and offset is None):
            raise FormatError(f"{name}: the stored spec has groups and also a scale or an offset")
        if groups is not None and zero is not None and ("group_zero" in groups.types or zero != int(zero)):
            raise FormatError(f"{name}: the stored spec has groups and a zero that does not go with them: {zero!r}")
        scales = reader.scales()
        if groups is not None and scales:
            raise FormatError(f"{name}: the stored spec has both groups and scales")
        return cls(
            rows=rows,
            columns=columns,
            dtype=dtype,
            grid=reader.text("grid"),
            code=Code(tree, low_bits),
            blocks=Blocks(block_rows, block_columns),
            scale=scale,
            offset=offset,
            relative_error=relative_error,
            checksum=int(checksum, 16),
            zero=zero,
            groups=groups,
            scales=scales,
            parts=reader.parts(),
        )


class _SpecReader:
    """Typed access to the fields of a spec, with errors that name the tensor and the field."""

    def __init__(self, name: str, fields: Mapping[str, Any]) -> None:
        self._name = name
        self._fields = fields

    def require(self, key: str) -> Any:
        if key not in self._fields:
            raise FormatError(f"{self._name}: the stored spec lacks {key!r}")
        return self._fields[key]

    def text(self, key: str) -> str:
        value = self.require(key)
        if not isinstance(value, str) or len(value) > 64:
            raise FormatError(f"{self._name}: {key} must be a short string, found {value!r:.80}")
        return value

    def int_pair(self, key: str, limit: int) -> tuple[int, int]:
        value = self.require(key)
        if not isinstance(value, list) or len(value) != 2 or not all(_is_int(v, 1, limit) for v in value):
            raise FormatError(f"{self._name}: {key} must be two integers from 1 to {limit}, found {value!r:.80}")
        return value[0], value[1]

    def low_bits(self) -> int:
        value = self._fields.get("low_bits", 0)
        if not _is_int(value, 0, MAX_LOW_BITS):
            raise FormatError(f"{self._name}: low_bits must be 0 to {MAX_LOW_BITS}, found {value!r:.80}")
        return int(value)

    def zero(self) -> float | None:
        value = self._fields.get("zero")
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 255:
            raise FormatError(f"{self._name}: zero must be 0 to 255, found {value!r:.80}")
        return value

    def scales(self) -> dict[str, str | int]:
        value = self._fields.get("scales", {})
        if not isinstance(value, dict) or not value.keys() <= set(SCALE_ARRAYS):
            raise FormatError(f"{self._name}: scales must be of {', '.join(SCALE_ARRAYS)}, found {value!r:.80}")
        for kind, form in value.items():
            is_type = isinstance(form, str) and form in (_SCALE_TYPES if kind != "offset" else ("F32",))
            is_octave = _is_int(form, 1, 64) and form in OCTAVE_CODES and kind != "offset"
            if not (is_type or is_octave):
                raise FormatError(f"{self._name}: {kind} is stored in an unknown form {form!r:.80}")
        return value

    def parts(self) -> tuple[int, int, int] | None:
        value = self._fields.get("parts")
        if value is None:
            return None
        if not isinstance(value, list) or len(value) != 3 or not all(_is_int(v, 0, _MAX_PART_BYTES) for v in value):
            raise FormatError(f"{self._name}: parts must be three sizes in bytes, found {value!r:.80}")
        return value[0], value[1], value[2]

    def groups(self) -> Groups | None:
        value = self._fields.get("groups")
        if value is None:
            return None
        if not isinstance(value, dict) or value.keys() - _GROUP_KEYS or not value.keys() >= {"size", "types"}:
            raise FormatError(f"{self._name}: groups must have size, types and no unknown keys, found {value!r:.80}")
        size, super_size, types = value["size"], value.get("super_size"), value["types"]
        if not _is_int(size, 1, MAX_AXIS) or not (super_size is None or _is_int(super_size, 1, MAX_AXIS)):
            raise FormatError(f"{self._name}: the size of a group must be 1 to {MAX_AXIS}, found {value!r:.80}")
        if not isinstance(types, dict) or not all(types[k] in GROUP_ARRAY_TYPES.get(k, ()) for k in types):
            raise FormatError(f"{self._name}: unknown arrays or types of group scales: {types!r:.80}")
        arithmetic, values = value.get("arithmetic", "F32"), value.get("values")
        if arithmetic not in _FLOAT_TYPES or values not in (None, "F8_E4M3", "F8_E5M2"):
            raise FormatError(f"{self._name}: unknown arithmetic {arithmetic!r:.20} or values {values!r:.20} of groups")
        for part in ("scale", "minimum"):
            # An integer has a meaning only as a multiple of a super scale, and a super scale needs its integers.
            nested = f"super_{part}" in types
            if nested != (types.get(f"group_{part}") in ("U8", "I8")) or (nested and super_size is None):
                raise FormatError(f"{self._name}: group_{part} and super_{part} do not go together: {value!r:.80}")
        if "group_scale" not in types:
            raise FormatError(f"{self._name}: groups have no group_scale")
        factor = _SpecReader(self._name, value).number("factor")
        return Groups(size, dict(types), super_size, arithmetic, values, factor)

    def number(self, key: str) -> float | None:
        value = self._fields.get(key)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= _FLOAT32_MAX:
            raise FormatError(f"{self._name}: {key} must be a finite float32, found {value!r:.80}")
        return float(value)


def _parse_object(text: str, name: str) -> dict[str, Any]:
    """A JSON object, strictly: no duplicate keys and no NaN."""

    def refuse_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(dict(pairs)) != len(pairs):
            raise ValueError("an object has a key twice")
        return dict(pairs)

    def refuse_constant(constant: str) -> Any:
        raise ValueError(f"{constant} is not JSON")

    try:
        fields = json.loads(text, object_pairs_hook=refuse_duplicates, parse_constant=refuse_constant)
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{name}: the stored spec is not valid JSON: {error}") from None
    if not isinstance(fields, dict):
        raise FormatError(f"{name}: the stored spec is not a JSON object")
    return fields


def _is_int(value: Any, low: int, high: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high


def _program(node: Node) -> list[int]:
    if isinstance(node, Leaf):
        return [_LEAF, node.symbol]
    if isinstance(node, Split):
        return [_SPLIT, *_program(node.left), *_program(node.right)]
    escape = [] if node.escape is None else _program(node.escape)
    return [_FIELD, node.bits, node.escape is not None, *node.symbols, *escape]


def _node_to_json(node: Node) -> Any:
    if isinstance(node, Leaf):
        return node.symbol
    if isinstance(node, Split):
        return {"split": [_node_to_json(node.left), _node_to_json(node.right)]}
    fields: dict[str, Any] = {"bits": node.bits}
    if node.symbols:
        fields["symbols"] = list(node.symbols)
    if node.escape is not None:
        fields["escape"] = _node_to_json(node.escape)
    return fields


def _node_from_json(value: Any, name: str, depth: int, nodes: int = 0) -> tuple[Node, int]:
    """The node, and how many nodes have been read so far."""
    nodes += 1
    if depth > MAX_DEPTH or nodes > MAX_NODES:
        raise FormatError(f"{name}: the code tree is too large")
    if _is_int(value, 0, 255) and depth == 0:
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
    if not (isinstance(bits, int) and (_is_int(bits, 1, MAX_FIELD_BITS) or bits == RAW_BITS)):
        raise FormatError(f"{name}: a field of the code tree has {bits!r:.80} bits, expected 1 to 6, or 8")
    escape: Node | None = None
    if "escape" in value:
        if bits == RAW_BITS:
            raise FormatError(f"{name}: a raw field of the code tree cannot have an escape")
        escape, nodes = _node_from_json(value["escape"], name, depth + 1, nodes)
    symbols = value.get("symbols", [])
    expected = 0 if bits == RAW_BITS else 2**bits - (escape is not None)
    if not isinstance(symbols, list) or len(symbols) != expected or not all(_is_int(s, 0, 255) for s in symbols):
        raise FormatError(f"{name}: a {bits}-bit field of the code tree needs {expected} symbols from 0 to 255")
    return Field(bits, tuple(symbols), escape), nodes
