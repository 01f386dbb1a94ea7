"""The JSON form of a spec: exact, strict, and every refusal by name."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from entrollm.errors import FormatError
from entrollm.format.blocks import Blocks
from entrollm.format.code import MAX_DEPTH, Code, Field, Leaf, Split
from entrollm.format.grid import GridKind
from entrollm.format.spec import SOURCE_DTYPES, TensorSpec
from tests.support.matrices import codes

floats = st.floats(width=32, allow_nan=False, allow_infinity=False)


@st.composite
def specs(draw: st.DrawFn) -> TensorSpec:
    return TensorSpec(
        rows=draw(st.integers(1, 2**20)),
        columns=draw(st.integers(1, 2**20)),
        dtype=draw(st.sampled_from(sorted(SOURCE_DTYPES))),
        grid_name=draw(st.text(max_size=64)),
        code=draw(codes()),
        blocks=Blocks(draw(st.integers(1, 8192)), draw(st.integers(1, 8192))),
        kind=GridKind(scale=draw(st.none() | floats), offset=draw(st.none() | floats), trellis=draw(st.booleans())),
        relative_error=draw(st.floats(0, 1e9)),
        checksum=draw(st.integers(0, 2**32 - 1)),
    )


@settings(deadline=None)
@given(specs())
def test_the_json_form_is_exact(spec: TensorSpec) -> None:
    assert TensorSpec.from_json(spec.to_json(), "w") == spec


GOOD: dict[str, Any] = {
    "shape": [3, 70],
    "dtype": "BF16",
    "grid": "paper-asymmetric-4-tensor",
    "block": [3, 128],
    "code": {"bits": 1, "symbols": [3], "escape": {"bits": 1, "symbols": [1, 2]}},
    "error": 0.1,
    "scale": 0.5,
    "offset": -1.0,
    "crc32": "0123abcd",
}


def text(**changes: Any) -> str:
    fields = GOOD | changes
    crc32 = fields.pop("crc32")
    return json.dumps({key: value for key, value in fields.items() if value is not ...} | {"crc32": crc32}).replace(
        ', "crc32": ', ',"crc32":'
    )


def test_the_form_is_what_the_document_says() -> None:
    spec = TensorSpec.from_json(text(), "w")
    assert spec.code == Code(Field(1, (3,), Field(1, (1, 2))))
    assert (spec.rows, spec.columns, spec.blocks, spec.checksum) == (3, 70, Blocks(3, 128), 0x0123ABCD)
    assert (spec.kind, spec.relative_error) == (GridKind(0.5, -1.0), 0.1)
    assert TensorSpec.from_json(text(code=7), "w").code == Code(Leaf(7))
    raw = {"split": [{"bits": 8}, {"bits": 1, "symbols": [4, 8]}]}
    assert TensorSpec.from_json(text(code=raw, low_bits=2), "w").code == Code(
        Split(Field(8, ()), Field(1, (4, 8))), low_bits=2
    )


def test_absent_scales_are_none() -> None:
    spec = TensorSpec.from_json(text(scale=..., offset=...), "w")
    assert spec.kind == GridKind()


def nested(depth: int) -> Any:
    node: Any = {"bits": 1, "symbols": [1, 2]}
    for _ in range(depth):
        node = {"bits": 1, "symbols": [1], "escape": node}
    return node


def wide(depth: int) -> Any:
    return {"split": [wide(depth - 1), wide(depth - 1)]} if depth else {"bits": 1, "symbols": [1, 2]}


BAD_FIELDS = {
    "unknown key": ({"sale": 1}, "the stored spec has the unknown key 'sale'"),
    "no shape": ({"shape": ...}, "the stored spec lacks 'shape'"),
    "no code": ({"code": ...}, "the stored spec lacks 'code'"),
    "no dtype": ({"dtype": ...}, "the stored spec lacks 'dtype'"),
    "no grid": ({"grid": ...}, "the stored spec lacks 'grid'"),
    "flat shape": ({"shape": [5]}, "shape must be two integers from 1 to 2147483648, found"),
    "no rows": ({"shape": [0, 5]}, "shape must be two integers"),
    "negative": ({"shape": [-1, 5]}, "shape must be two integers"),
    "real rows": ({"shape": [1.0, 5]}, "shape must be two integers"),
    "true rows": ({"shape": [True, 5]}, "shape must be two integers"),
    "absurd rows": ({"shape": [2**31 + 1, 5]}, "shape must be two integers"),
    "absurd product": ({"shape": [2**31, 2**31]}, "2147483648 x 2147483648 weights are more than the format allows"),
    "absurd block": ({"block": [1, 8193]}, "block must be two integers from 1 to 8192, found"),
    "no block": ({"block": "all"}, "block must be two integers"),
    "unknown dtype": ({"dtype": "I8"}, "dtype is 'I8', expected one of BF16, F16"),
    "long dtype": ({"dtype": "F" * 65}, "dtype must be a short string"),
    "number grid": ({"grid": 4}, "grid must be a short string, found 4"),
    "low bits": ({"low_bits": 7}, "low_bits must be 0 to 6, found 7"),
    "true low bits": ({"low_bits": True}, "low_bits must be 0 to 6, found True"),
    "overlap": ({"low_bits": 1}, "a symbol of the code tree overlaps the 1 low bits"),
    "scale text": ({"scale": "1"}, "scale must be a finite float32, found '1'"),
    "scale true": ({"scale": True}, "scale must be a finite float32, found True"),
    "scale beyond float32": ({"scale": 3.41e38}, "scale must be a finite float32"),
    "scale beyond float64": ({"scale": 10**400}, "scale must be a finite float32"),
    "offset list": ({"offset": [1]}, "offset must be a finite float32"),
    "trellis number": ({"trellis": 1}, "trellis must be true or absent, found 1"),
    "trellis false": ({"trellis": False}, "trellis must be true or absent, found False"),
    "trellis and groups": (
        {"trellis": True, "scale": ..., "offset": ..., "groups": {"size": 32, "types": {"group_scale": "F16"}}},
        "the stored spec has both groups and a trellis",
    ),
    "trellis and lossless": (
        {"trellis": True, "scale": ..., "offset": ..., "lossless": "BF16"},
        "the stored spec has both lossless and trellis",
    ),
    "no error": ({"error": ...}, "error must be a number of at least 0, found None"),
    "negative error": ({"error": -0.5}, "error must be a number of at least 0, found -0.5"),
    "short crc": ({"crc32": "123"}, "crc32 must be 8 hex digits, found '123'"),
    "upper crc": ({"crc32": "0123ABCD"}, "crc32 must be 8 hex digits"),
    "inner leaf": ({"code": {"split": [1, 2]}}, "a node of the code tree is 1"),
    "large leaf": ({"code": 256}, "a node of the code tree is 256"),
    "null node": ({"code": None}, "a node of the code tree is None"),
    "one child": ({"code": {"split": [GOOD["code"]]}}, "a split of the code tree needs two children"),
    "mixed node": ({"code": {"split": [1, 2], "bits": 1}}, "a node of the code tree has the unexpected key 'bits'"),
    "strange node": ({"code": {"bits": 1, "symbol": 1}}, "a node of the code tree has the unexpected key 'symbol'"),
    "no width": ({"code": {"symbols": [1]}}, "a field of the code tree has None bits, expected 1 to 6, or 8"),
    "seven bits": ({"code": {"bits": 7}}, "a field of the code tree has 7 bits"),
    "raw escape": ({"code": {"bits": 8, "escape": {"bits": 8}}}, "a raw field of the code tree cannot have an escape"),
    "few symbols": ({"code": {"bits": 2, "symbols": [1, 2, 3]}}, "a 2-bit field of the code tree needs 4 symbols"),
    "many symbols": (
        {"code": {"bits": 1, "symbols": [1, 2], "escape": {"bits": 8}}},
        "a 1-bit field of the code tree needs 1 symbols",
    ),
    "raw symbols": ({"code": {"bits": 8, "symbols": [1]}}, "a 8-bit field of the code tree needs 0 symbols"),
    "large symbol": ({"code": {"bits": 1, "symbols": [1, 256]}}, "needs 2 symbols from 0 to 255"),
    "deep tree": ({"code": nested(MAX_DEPTH + 1)}, "the code tree is too large"),
    "large tree": ({"code": {"bits": 1, "symbols": [1], "escape": wide(8)}}, "the code tree is too large"),
}


@pytest.mark.parametrize("case", BAD_FIELDS)
def test_a_bad_field_is_refused(case: str) -> None:
    changes, message = BAD_FIELDS[case]
    with pytest.raises(FormatError, match=message) as caught:
        TensorSpec.from_json(text(**changes), "w")
    assert str(caught.value).startswith("w: ")


@pytest.mark.parametrize("depth", [MAX_DEPTH, 8])
def test_the_largest_trees_are_read(depth: int) -> None:
    tree = nested(depth) if depth == MAX_DEPTH else wide(depth)
    assert TensorSpec.from_json(text(code=tree), "w").code.program()


BAD_TEXTS = {
    "empty": ("", "the stored spec is not valid JSON"),
    "cut": (text()[:-1], "the stored spec is not valid JSON"),
    "list": ("[1, 2]", "the stored spec is not a JSON object"),
    "nan": (text().replace("0.5", "NaN"), "NaN is not JSON"),
    "infinity": (text().replace("0.5", "-Infinity"), "-Infinity is not JSON"),
    "twice": (text().replace('"error"', '"scale"'), "an object has a key twice"),
    "twice in a node": (text().replace('"bits": 1,', '"bits": 1, "bits": 1,'), "an object has a key twice"),
    "deep": ('{"code":' * 100_000, "the stored spec is not valid JSON"),
    "long number": (text().replace("0.5", "9" * 10_000), "the stored spec is not valid JSON"),
    "crc first": (
        '{"crc32":"0123abcd",' + text()[1:].replace(',"crc32":"0123abcd"', ""),
        "crc32 must come last in the stored spec",
    ),
    "space at the end": (text() + " ", "crc32 must come last in the stored spec"),
}


@pytest.mark.parametrize("case", BAD_TEXTS)
def test_a_text_that_is_no_spec_is_refused(case: str) -> None:
    content, message = BAD_TEXTS[case]
    with pytest.raises(FormatError, match=message):
        TensorSpec.from_json(content, "w")


def test_a_scale_of_the_largest_float32_is_read() -> None:
    spec = TensorSpec.from_json(text(scale=3.4028234663852886e38), "w")
    assert isinstance(spec.kind, GridKind) and spec.kind.scale is not None and math.isfinite(spec.kind.scale)
