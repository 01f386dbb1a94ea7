"""The GGUF reader: what it reads, and every malformed file by name."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from entrollm.errors import EntroLLMError, FormatError, UnsupportedError
from entrollm.files.gguf import open_gguf
from tests.support.gguf_sources import GgufSource, encode_value, text, tiny_gguf


def write(tmp_path: Path, content: bytes) -> Path:
    (tmp_path / "file.gguf").write_bytes(content)
    return tmp_path / "file.gguf"


def test_values_and_tensors_are_read(tmp_path: Path) -> None:
    made = tiny_gguf({"a.flag": True, "a.float": 0.5, "a.text": "naïve"})
    made.tensors.append(("half.weight", (2, 3), 1, np.arange(6, dtype=np.float16).tobytes()))
    file = open_gguf(write(tmp_path, made.to_bytes()))
    assert dict(file.metadata) == made.values
    assert file.array("output_norm.weight").tolist() == [1, 1, 1]
    assert file.array("half.weight").tolist() == [[0, 1, 2], [3, 4, 5]]
    assert file.array("token_embd.weight").shape == (2, 34)
    file.release("half.weight")
    file.close()
    with pytest.raises(ValueError, match="is closed"):
        file.array("half.weight")


def test_arrays_of_numbers_are_read(tmp_path: Path) -> None:
    made = tiny_gguf()
    head = struct.pack("<IIQ3i", 9, 5, 3, -1, 0, 7)
    content = made.to_bytes().replace(encode_value(["x", "yz"]), head)
    # The data moves: pad so that it stays aligned.
    shorter = len(encode_value(["x", "yz"])) - len(head)
    content = content.replace(text("a.list"), text("a.list" + "t" * shorter))
    assert open_gguf(write(tmp_path, content)).metadata["a.list" + "t" * shorter] == [-1, 0, 7]


def changed(change: Any) -> bytes:
    made = tiny_gguf()
    change(made)
    return made.to_bytes()


def tensor(**changes: Any) -> Any:
    """A file whose first tensor is changed."""

    def change(made: GgufSource) -> None:
        name, shape, kind, content = made.tensors[0]
        fields = {"name": name, "shape": shape, "kind": kind, "content": content} | changes
        made.tensors[0] = (fields["name"], fields["shape"], fields["kind"], fields["content"])

    return changed(change)


GOOD = tiny_gguf().to_bytes()


@pytest.mark.parametrize(
    ("content", "error", "message"),
    [
        (b"", FormatError, "too short for a GGUF file"),
        (b"GGML" + GOOD[4:], FormatError, "it does not begin with GGUF"),
        (GOOD[:4] + struct.pack("<I", 1) + GOOD[8:], UnsupportedError, "GGUF version 1; supported are"),
        (
            GOOD[:8] + struct.pack("<Q", 2**60) + GOOD[16:],
            FormatError,
            "begins something of 27670116110564327424 bytes",
        ),
        (GOOD[:16] + struct.pack("<Q", 2**63) + GOOD[24:], FormatError, "it is truncated or damaged"),
        (GOOD[:24] + struct.pack("<Q", 2**62) + GOOD[32:], FormatError, "it is truncated or damaged"),
        (GOOD.replace(b"a.number", b"\xff.number"), FormatError, "is not UTF-8"),
        (GOOD.replace(text("a.number"), text("a.list")), FormatError, r"the key 'a\.list' occurs twice"),
        (GOOD.replace(encode_value(7), struct.pack("<II", 13, 7)), FormatError, "of the unknown type 13"),
        (GOOD.replace(struct.pack("<IIQ", 9, 8, 2), struct.pack("<IIQ", 9, 9, 2)), FormatError, "is of type 9"),
        (GOOD.replace(struct.pack("<IIQ", 9, 8, 2), struct.pack("<IIQ", 9, 8, 2**61)), FormatError, "truncated"),
        (tensor(shape=()), FormatError, "has 0 axes, expected 1 to 4"),
        (tensor(shape=(1, 1, 1, 1, 32)), FormatError, "has 5 axes"),
        (tensor(shape=(0, 32)), FormatError, r"has shape \[0, 32\], expected rows of whole Q8_0 blocks"),
        (tensor(shape=(2, 33)), FormatError, r"has shape \[2, 33\], expected rows of whole"),
        (tensor(shape=(2**62, 32)), FormatError, "expected rows of whole"),
        (tensor(shape=(10**6, 32)), FormatError, "ends at byte"),
        (tensor(kind=9), UnsupportedError, "is of type Q8_1; supported are"),
        (tensor(kind=99), UnsupportedError, "is of type number 99"),
        (tensor(name="output_norm.weight"), FormatError, "occurs twice"),
        (tensor(shape=(3, 32)), FormatError, "begins at 96, which is not aligned, or lies in another tensor"),
        (tiny_gguf({"general.alignment": 12}).to_bytes(), FormatError, "general.alignment is 12, expected a power"),
        (tiny_gguf({"general.alignment": 0}).to_bytes(), FormatError, "general.alignment is 0"),
        (tiny_gguf({"general.alignment": "x"}).to_bytes(), FormatError, "general.alignment is 'x'"),
    ],
)
def test_malformed_files_are_refused(content: bytes, error: type, message: str, tmp_path: Path) -> None:
    with pytest.raises(error, match=message):
        open_gguf(write(tmp_path, content))


def read_all(path: Path) -> None:
    file = open_gguf(path)
    for name in file.tensors:
        file.array(name).tobytes()


def test_truncation_anywhere_is_refused(tmp_path: Path) -> None:
    end = open_gguf(write(tmp_path, GOOD)).tensors["output_norm.weight"].end
    for size in range(end):
        with pytest.raises(FormatError):
            read_all(write(tmp_path, GOOD[:size]))


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(at=st.integers(4, len(GOOD) - 1), octets=st.binary(min_size=1, max_size=9))
def test_damage_gives_an_error_or_other_numbers(at: int, octets: bytes, tmp_path: Path) -> None:
    content = (GOOD[:at] + octets + GOOD[at + len(octets) :])[: len(GOOD)]
    try:
        read_all(write(tmp_path, content))
    except EntroLLMError:
        return
