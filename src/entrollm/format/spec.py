"""What a compressed matrix is, with a strict JSON form.

The kind of a matrix says what its symbols mean. It is a tagged union: `GridKind` has scales of rows and columns,
`GroupedKind` has scales of groups of columns, and `LosslessKind` has none. All kinds share the shape, the code, the
blocks and the checksum. A new kind is a dataclass with `to_json`, `from_json` and `entry_names`, and a line in
`_kind_from_json`.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, TypeAlias

from entrollm.format.blocks import Blocks
from entrollm.format.code import MAX_LOW_BITS, Code, listed_symbols, node_to_json, tree_from_json
from entrollm.format.flat import AnyCode, FlatCode, flat_from_json
from entrollm.format.grid import GridKind
from entrollm.format.group_scales import GroupedKind
from entrollm.format.json_fields import JsonFields, is_int
from entrollm.format.lossless import LosslessKind

FORMAT_VERSION = 2
"""The version that is written."""
READ_VERSIONS = (1, 2)
MAX_AXIS = 2**31
MAX_WEIGHTS = 2**40
MAX_BLOCK_WEIGHTS = 8192
# Types that the original of a compressed matrix may have.
SOURCE_DTYPES = frozenset({"F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2"})
_SPEC_KEYS = frozenset(
    {"shape", "dtype", "grid", "block", "code", "low_bits", "error", "scale", "offset", "zero", "scales", "parts"}
    | {"trellis", "groups", "lossless", "crc32"}
)
_MAX_PART_BYTES = 2**44

Kind: TypeAlias = GridKind | GroupedKind | LosslessKind
"""What the symbols of a matrix mean."""


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One compressed matrix.

    Attributes:
        rows, columns: out_features and in_features.
        dtype: the type of the original tensor, which `export` restores, by its safetensors name.
        grid_name: how the scales were chosen, human-readable ("paper-asymmetric-4", ...).
        code, blocks: how the symbols are stored; blocks of a flat code are its segments.
        kind: what the symbols mean.
        relative_error: RMS quantization error over the RMS of the original weights.
        checksum: CRC-32 of the name, this spec and all entries of the matrix; see docs/reference/format.md.
        parts: sizes in bytes of the dense stream, the sparse stream and the small arrays in the one entry that holds
            them; None if each has an entry of its own.
    """

    rows: int
    columns: int
    dtype: str
    grid_name: str
    code: AnyCode
    blocks: Blocks
    kind: Kind
    relative_error: float = 0.0
    checksum: int = 0
    parts: tuple[int, int, int] | None = None

    @property
    def has_trellis(self) -> bool:
        """Whether the symbols of a row choose between two grids."""
        return isinstance(self.kind, GridKind) and self.kind.trellis

    def to_json(self) -> str:
        """Compact JSON. Floats round-trip exactly; the checksum comes last because it covers what precedes it."""
        fields: dict[str, Any] = {
            "shape": [self.rows, self.columns],
            "dtype": self.dtype,
            "grid": self.grid_name,
        }
        if isinstance(self.code, FlatCode):
            fields["code"] = self.code.to_json()
        else:
            fields["block"] = [self.blocks.rows, self.blocks.columns]
            fields["code"] = node_to_json(self.code.tree)
        fields["error"] = self.relative_error
        if isinstance(self.code, Code) and self.code.low_bits:
            fields["low_bits"] = self.code.low_bits
        fields |= self.kind.to_json()
        if self.parts is not None:
            fields["parts"] = list(self.parts)
        fields["crc32"] = f"{self.checksum:08x}"
        return json.dumps(fields, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str, name: str) -> TensorSpec:
        """Parse and check the JSON form.

        Args:
            text: the stored text.
            name: the tensor, for errors.
        Raises:
            FormatError: the text is not a valid spec.
        """
        fields = JsonFields.parse(text, name)
        fields.refuse_unknown(_SPEC_KEYS)
        rows, columns = fields.int_pair("shape", MAX_AXIS)
        if rows * columns > MAX_WEIGHTS:
            raise fields.error(f"{rows} x {columns} weights are more than the format allows")
        kind = _kind_from_json(fields)
        code, blocks = _read_coding(fields, columns, kind)
        dtype = fields.text("dtype")
        if dtype not in SOURCE_DTYPES:
            raise fields.error(f"dtype is {dtype!r}, expected one of {', '.join(sorted(SOURCE_DTYPES))}")
        checksum = _read_checksum(fields, text)
        relative_error = fields.number("error")
        if relative_error is None or relative_error < 0:
            raise fields.error(f"error must be a number of at least 0, found {fields.get('error')!r}")
        return cls(
            rows=rows,
            columns=columns,
            dtype=dtype,
            grid_name=fields.text("grid"),
            code=code,
            blocks=blocks,
            kind=kind,
            relative_error=relative_error,
            checksum=checksum,
            parts=_read_parts(fields),
        )


def _kind_from_json(fields: JsonFields) -> Kind:
    if "lossless" in fields:
        return LosslessKind.from_json(fields)
    return GroupedKind.from_json(fields) if fields.get("groups") is not None else GridKind.from_json(fields)


def _read_checksum(fields: JsonFields, text: str) -> int:
    checksum = fields.text("crc32")
    if len(checksum) != 8 or any(c not in "0123456789abcdef" for c in checksum):
        raise fields.error(f"crc32 must be 8 hex digits, found {checksum!r}")
    if not text.endswith(f',"crc32":"{checksum}"}}'):
        raise fields.error("crc32 must come last in the stored spec")
    return int(checksum, 16)


def _read_coding(fields: JsonFields, columns: int, kind: Kind) -> tuple[AnyCode, Blocks]:
    flat = flat_from_json(fields.require("code"), fields.name)
    if flat is None:
        return _read_code(fields), Blocks(*fields.int_pair("block", MAX_BLOCK_WEIGHTS))
    if isinstance(kind, GroupedKind):
        raise fields.error("a flat code has no group scales")
    for key in ("block", "low_bits"):
        if fields.get(key) is not None:
            raise fields.error(f"a flat code has no {key}")
    if fields.get("parts") is None:
        raise fields.error("a flat code needs parts")
    return flat, flat.blocks(columns)


def _read_code(fields: JsonFields) -> Code:
    tree = tree_from_json(fields.require("code"), fields.name)
    low_bits = fields.get("low_bits", 0)
    if not is_int(low_bits, 0, MAX_LOW_BITS):
        raise fields.error(f"low_bits must be 0 to {MAX_LOW_BITS}, found {low_bits!r:.80}")
    if any(symbol % (1 << low_bits) for symbol in listed_symbols(tree)):
        raise fields.error(f"a symbol of the code tree overlaps the {low_bits} low bits")
    return Code(tree, int(low_bits))


def _read_parts(fields: JsonFields) -> tuple[int, int, int] | None:
    value = fields.get("parts")
    if value is None:
        return None
    if not isinstance(value, list) or len(value) != 3 or not all(is_int(v, 0, _MAX_PART_BYTES) for v in value):
        raise fields.error(f"parts must be three sizes in bytes, found {value!r:.80}")
    return value[0], value[1], value[2]
