"""Group scales in files: the strict form of their spec, and damaged or malicious entries."""

from __future__ import annotations

import json
import shutil
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from entrollm.errors import CorruptStreamError, FormatError
from entrollm.files.dtypes import DTYPES
from entrollm.format import layout
from entrollm.format.group_scales import GroupedKind
from entrollm.format.spec import TensorSpec
from tests.support.folders import change_entries, change_spec, contents, harmless_flips
from tests.support.paths import GOLDEN

GOLDEN_GROUPS = GOLDEN / "v1-groups"
NESTED = "nested.weight"
SPEC: dict[str, Any] = {
    "shape": [3, 70],
    "dtype": "F16",
    "grid": "imported-GPTQ",
    "block": [3, 128],
    "code": {"bits": 4, "symbols": list(range(16))},
    "error": 0.0,
}
GROUPS: dict[str, Any] = {"size": 32, "types": {"group_scale": "F16"}}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    shutil.copytree(GOLDEN_GROUPS, tmp_path / "model")
    return tmp_path / "model"


def parse(groups: Any, **more: Any) -> TensorSpec:
    text = json.dumps({**SPEC, **more, "groups": groups, "crc32": "0123abcd"}, separators=(",", ":"))
    return TensorSpec.from_json(text, "w")


@given(
    size=st.integers(1, 2**31),
    zero=st.none() | st.integers(0, 255),
    arithmetic=st.sampled_from(["F32", "F16", "BF16"]),
    values=st.sampled_from([None, "F8_E4M3", "F8_E5M2"]),
    factor=st.none() | st.floats(width=32, allow_nan=False, allow_infinity=False),
    order=st.booleans(),
)
def test_the_json_form_is_exact(size: int, order: bool, zero: int | None, **options: Any) -> None:
    types = {"group_scale": "BF16"} | ({"column_order": "U32"} if order else {})
    given_options = {key: value for key, value in options.items() if value is not None}
    spec = parse({"size": size, "types": types, **given_options}, **({} if zero is None else {"zero": zero}))
    assert TensorSpec.from_json(spec.to_json(), "w") == spec
    assert isinstance(spec.kind, GroupedKind) and (spec.kind.size, spec.kind.zero, spec.kind.types) == (
        size,
        zero,
        types,
    )
    assert {key: getattr(spec.kind, key) for key in options} == options


@pytest.mark.parametrize(
    ("groups", "more", "message"),
    [
        ([32], {}, "groups must have size, types and no unknown keys"),
        ({"size": 32}, {}, "groups must have size, types"),
        (GROUPS | {"kind": 1}, {}, "no unknown keys"),
        (GROUPS | {"size": 0}, {}, "the size of a group must be 1 to"),
        (GROUPS | {"size": True}, {}, "the size of a group must be 1 to"),
        (GROUPS | {"super_size": 2**31 + 1}, {}, "the size of a group must be 1 to"),
        (GROUPS | {"types": {"group_scale": "F64"}}, {}, "unknown arrays or types"),
        (GROUPS | {"types": {"group_scale": "F16", "extra": "U8"}}, {}, "unknown arrays or types"),
        (GROUPS | {"types": ["group_scale"]}, {}, "unknown arrays or types"),
        (GROUPS | {"types": {}}, {}, "groups have no group_scale"),
        (GROUPS | {"types": {"group_scale": "U8"}}, {}, "group_scale and super_scale do not go together"),
        (GROUPS | {"types": {"group_scale": "F16", "super_scale": "F16"}, "super_size": 8}, {}, "do not go together"),
        (GROUPS | {"types": {"group_scale": "U8", "super_scale": "F16"}}, {}, "do not go together"),
        (GROUPS | {"types": {"group_scale": "F16", "group_minimum": "I8"}}, {}, "group_minimum and super_minimum"),
        (GROUPS | {"arithmetic": "F8_E4M3"}, {}, "unknown arithmetic"),
        (GROUPS | {"values": "I8"}, {}, "or values 'I8'"),
        (GROUPS | {"factor": 1e39}, {}, "factor must be a finite float32"),
        (GROUPS, {"scale": 1.0}, "has groups and also a scale"),
        (GROUPS, {"offset": 1.0}, "has groups and also a scale or an offset"),
        (
            GROUPS | {"types": {"group_scale": "F16", "group_zero": "U8"}},
            {"zero": 1},
            "groups and a zero that does not go with them: 1",
        ),
        (GROUPS, {"zero": 1.5}, "groups and a zero that does not go with them: 1.5"),
        (GROUPS, {"scales": {"scale": "F32"}}, "both groups and scales"),
    ],
)
def test_other_forms_are_refused(groups: Any, more: dict[str, Any], message: str) -> None:
    with pytest.raises(FormatError, match=message):
        parse(groups, **more)


@given(
    st.sampled_from(["U8", "I8", "U32", "F16", "BF16", "F32"]).flatmap(
        lambda dtype: hnp.arrays(np.uint8, st.integers(0, 50).map(lambda n: n * DTYPES[dtype].itemsize)).map(
            lambda octets: octets.view(DTYPES[dtype])
        )
    )
)
def test_arrays_survive_packing(array: np.ndarray[Any, Any]) -> None:
    name = next(name for name, dtype in DTYPES.items() if dtype == array.dtype)
    assert layout.inflate_array("w", layout.deflate_array(array), name, array.size).tobytes() == array.tobytes()


@pytest.mark.parametrize(
    ("stored", "message"),
    [
        (zlib.compress(bytes(29)), "does not hold exactly 15 numbers of type F16"),
        (zlib.compress(bytes(31)), "does not hold exactly 15 numbers"),
        (zlib.compress(bytes(30)) + b"x", "does not hold exactly 15 numbers"),
        (zlib.compress(bytes(30))[:-1], "does not hold exactly 15 numbers"),
        (b"not deflated at all", "incorrect header check; the file is damaged"),
    ],
)
def test_arrays_that_do_not_inflate_are_refused(stored: bytes, message: str) -> None:
    with pytest.raises(CorruptStreamError, match=message):
        layout.inflate_array("w", np.frombuffer(stored, np.uint8), "F16", 15)


def test_a_huge_claim_takes_no_memory() -> None:
    with pytest.raises(CorruptStreamError, match="11 bytes cannot hold 1099511627776 numbers of type F32"):
        layout.inflate_array("w", np.zeros(11, np.uint8), "F32", 2**40)


def test_missing_and_stray_entries_are_refused(folder: Path) -> None:
    file = folder / "model.safetensors"
    scale = np.ones(1, np.float32)
    for name, entry, message in (
        (NESTED + ".group_minimum", None, "nested.weight: it lacks group_minimum, which its spec declares"),
        (
            NESTED + ".group_zero",
            ("U8", layout.deflate_array(scale)),
            "it has group_zero, which its spec does not",
        ),
        (NESTED + ".scale", ("F32", scale), "it has scale, which its spec does not"),
    ):
        content = file.read_bytes()
        change_entries(file, {name: entry})
        with pytest.raises(FormatError, match=message):
            contents(folder)
        file.write_bytes(content)


def test_values_that_no_weight_is_made_of_are_refused(folder: Path) -> None:
    file = folder / "model.safetensors"
    scales = np.array([[1, np.nan], [1, 1], [1, 1]], np.float16)
    order = np.array([0, 1, 2, 3, 4, 5, 6, 7, 8, 8], np.uint32)
    for name, array, message in (
        (NESTED + ".super_scale", scales, "its super_scale has a value that is not finite"),
        ("integer.zeros.weight.column_order", order, "its column_order does not name every column once"),
    ):
        content = file.read_bytes()
        change_entries(file, {name: ("U8", layout.deflate_array(array))})
        with pytest.raises(FormatError, match=message):
            contents(folder)
        file.write_bytes(content)


def test_scales_of_groups_without_groups_are_refused(folder: Path) -> None:
    change_spec(folder / "model.safetensors", NESTED, groups=None, scale=1.0)
    with pytest.raises(FormatError, match=r"nested.weight: it has group_scale, which its spec does not declare"):
        contents(folder)


def test_groups_wider_than_a_row_are_one_group(folder: Path) -> None:
    file = folder / "model.safetensors"
    change_spec(file, "row.weight", groups={"size": 2**31, "types": {"group_scale": "F32"}})
    assert contents(folder)["row.weight"]


def test_a_flipped_bit_fails_its_checksum_or_is_refused(folder: Path, file: Path) -> None:
    generator = np.random.default_rng(6)
    harmless_flips(folder, file, generator.integers(8, file.stat().st_size, 300).tolist(), generator)
