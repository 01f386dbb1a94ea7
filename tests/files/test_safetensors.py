"""The safetensors reader: what it returns, and every file that it must refuse."""

import errno
import json
import mmap
import struct
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from entrollm.errors import FormatError
from entrollm.files.dtypes import DTYPES
from entrollm.files.gguf import open_gguf
from entrollm.files.safetensors import open_safetensors

GOOD = {"a": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}}


def write(path: Path, header: object, data: bytes = bytes(16)) -> Path:
    """Write a file from a header, given as JSON or as its very bytes."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def entry(**changes: object) -> dict[str, Any]:
    return {"a": {**GOOD["a"], **changes}}


def test_reads_what_the_safetensors_package_writes(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    arrays = {
        "f32": generator.standard_normal((3, 5)).astype(np.float32),
        "bf16": generator.standard_normal((4, 2)).astype(ml_dtypes.bfloat16),
        "i8": generator.integers(-128, 127, (7,)).astype(np.int8),
        "scalar": np.array(2.5, np.float16),
        "empty": np.zeros((0, 4), np.float32),
        "bool": np.array([True, False]),
    }
    save_file(arrays, tmp_path / "x.safetensors", metadata={"format": "pt"})
    with open_safetensors(tmp_path / "x.safetensors") as file:
        assert file.metadata == {"format": "pt"}
        assert set(file.tensors) == set(arrays)
        for name, expected in arrays.items():
            np.testing.assert_array_equal(file.array(name), expected)
            assert file.array(name).dtype == expected.dtype
            assert file.array(name).shape == expected.shape


def test_arrays_are_read_only_views_of_the_map(tmp_path: Path) -> None:
    path = write(tmp_path / "x.safetensors", GOOD, np.arange(4, dtype=np.float32).tobytes())
    file = open_safetensors(path)
    first, second = file.array("a"), file.array("a")
    assert not first.flags.writeable
    assert not first.flags.owndata
    assert np.shares_memory(first, second)
    file.close()
    assert first.tolist() == [[0, 1], [2, 3]]
    with pytest.raises(ValueError, match="is closed"):
        file.array("a")


def test_tensors_come_in_file_order_and_at_any_alignment(tmp_path: Path) -> None:
    header = {
        "z": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]},
        "b": {"dtype": "F32", "shape": [1], "data_offsets": [3, 7]},
        "a": {"dtype": "BF16", "shape": [1], "data_offsets": [1, 3]},
    }
    data = b"\x07" + np.array([1.5], ml_dtypes.bfloat16).tobytes() + np.array([2.5], np.float32).tobytes()
    file = open_safetensors(write(tmp_path / "x.safetensors", header, data))
    assert list(file.tensors) == ["z", "a", "b"]
    assert [float(file.array(name)[0]) for name in file.tensors] == [7, 1.5, 2.5]
    assert file.tensors["b"].size_bytes == 4
    assert file.tensors["b"].begin == path_size(file.path) - 4


def path_size(path: Path) -> int:
    return path.stat().st_size


def test_release_keeps_views_valid(tmp_path: Path) -> None:
    path = write(tmp_path / "x.safetensors", GOOD, np.arange(4, dtype=np.float32).tobytes())
    file = open_safetensors(path)
    view = file.array("a")
    file.release("a")
    assert view.tolist() == [[0, 1], [2, 3]]


def test_an_empty_header_is_a_file_without_tensors(tmp_path: Path) -> None:
    assert dict(open_safetensors(write(tmp_path / "x.safetensors", b"{}  ", b"")).tensors) == {}


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype_has_an_array(tmp_path: Path, dtype: str) -> None:
    size = DTYPES[dtype].itemsize * 3
    header = {"a": {"dtype": dtype, "shape": [3], "data_offsets": [0, size]}}
    file = open_safetensors(write(tmp_path / "x.safetensors", header, bytes(size)))
    assert file.array("a").shape == (3,)


BAD_HEADERS = {
    "not an object": (b"[1, 2]", "must begin with '{'"),
    "leading space": (b" {}", "must begin with '{'"),
    "empty": (b"", "must begin with '{'"),
    "cut json": (b'{"a":', "the header is not valid JSON"),
    "not utf-8": (b'{"\xff": 1}', "the header is not valid JSON"),
    "endless nesting": (b'{"a":' + b"[" * 100_000, "the header is not valid JSON"),
    "endless integer": (b'{"a":' + b"9" * 10_000 + b"}", "the header is not valid JSON"),
    "nan": (b'{"a": NaN}', "holds NaN, which is not JSON"),
    "duplicate tensor": (b'{"a": 1, "a": 2}', "has the key 'a' twice"),
    "duplicate after many": (b"{%s" % b"".join(b'"%d":0,' % i for i in range(100_000)) + b'"a":0,"a":0}', "'a' twice"),
    "duplicate field": (b'{"a": {"dtype": "F32", "dtype": "F32"}}', "has the key 'dtype' twice"),
    "metadata list": ({"__metadata__": []}, "__metadata__ must be an object of strings, found list"),
    "metadata number": ({"__metadata__": {"k": 1}}, r"__metadata__\['k'\] must be a string, found int"),
    "entry number": ({"a": 5}, "tensor 'a' must have exactly dtype, shape and data_offsets, found int"),
    "entry short": ({"a": {"dtype": "F32"}}, r"must have exactly .* found \['dtype'\]"),
    "entry long": (entry(stride=[1]), "must have exactly dtype, shape and data_offsets"),
    "unknown dtype": (entry(dtype="F33"), "tensor 'a' has dtype 'F33', expected one of BOOL"),
    "dtype number": (entry(dtype=32), "tensor 'a' has dtype 32"),
    "negative axis": (entry(shape=[-2, -2]), r"shape \[-2, -2\], expected a list of integers of at least 0"),
    "boolean axis": (entry(shape=[True, 4]), "expected a list of integers"),
    "float axis": (entry(shape=[2.0, 2]), "expected a list of integers"),
    "shape number": (entry(shape=4), "expected a list of integers"),
    "too many axes": (entry(shape=[1] * 33), "has 33 axes, at most 32"),
    "three offsets": (entry(data_offsets=[0, 8, 16]), "expected two integers of at least 0"),
    "negative offset": (entry(data_offsets=[-16, 0]), "expected two integers of at least 0"),
    "backward offsets": (entry(data_offsets=[16, 0]), "which end before they begin"),
    "wrong count": (entry(shape=[2, 3]), r"of shape \[2, 3\] F32 takes 24 bytes, its offsets give 16"),
    "product wraps in 64 bits": (entry(shape=[2**32, 2**32 + 1]), "more than an array can hold"),
    "hidden by zero": (entry(shape=[2**62, 2**62, 0], data_offsets=[0, 0]), "more than an array can hold"),
    "hole before": (entry(data_offsets=[4, 20]), "4 bytes before tensor 'a' belong to no tensor"),
}


@pytest.mark.parametrize("case", BAD_HEADERS)
def test_a_bad_header_is_refused(tmp_path: Path, case: str) -> None:
    header, message = BAD_HEADERS[case]
    path = write(tmp_path / "x.safetensors", header)
    with pytest.raises(FormatError, match=message) as caught:
        open_safetensors(path)
    assert str(path) in str(caught.value)


def test_overlapping_tensors_are_refused(tmp_path: Path) -> None:
    header = {**GOOD, "b": {"dtype": "F32", "shape": [2], "data_offsets": [8, 16]}}
    with pytest.raises(FormatError, match="tensor 'b' overlaps another by 8 bytes"):
        open_safetensors(write(tmp_path / "x.safetensors", header))


def test_a_truncated_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match=r"tensor 'a' ends at byte \d+, but the file has \d+ bytes; it is truncated"):
        open_safetensors(write(tmp_path / "x.safetensors", GOOD, bytes(15)))


def test_bytes_after_the_last_tensor_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match=r"the tensors end at byte \d+, but the file has"):
        open_safetensors(write(tmp_path / "x.safetensors", GOOD, bytes(17)))


@pytest.mark.parametrize("size_bytes", [0, 7])
def test_a_file_without_a_length_is_refused(tmp_path: Path, size_bytes: int) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(bytes(size_bytes))
    with pytest.raises(FormatError, match=f"begins with an 8-byte length, found a file of {size_bytes} bytes"):
        open_safetensors(path)


def test_an_absurd_header_size_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(
        FormatError, match="at most 100000000 are allowed; this is not a safetensors file, or it is a Git LFS"
    ):
        open_safetensors(path)


def test_a_header_beyond_the_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(struct.pack("<Q", 3) + b"{}")
    with pytest.raises(FormatError, match="the header claims 3 bytes, but the file ends after 10 bytes"):
        open_safetensors(path)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=300)
@given(data=st.data())
def test_any_damage_is_refused_or_harmless(tmp_path: Path, data: st.DataObject) -> None:
    header = {**GOOD, "b": {"dtype": "I8", "shape": [4, 2], "data_offsets": [16, 24]}, "__metadata__": {"k": "v"}}
    original = write(tmp_path / "good.safetensors", header, bytes(24)).read_bytes()
    damaged = bytearray(original)
    for _ in range(data.draw(st.integers(1, 3))):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    damaged = damaged[: data.draw(st.integers(0, len(damaged)))]
    path = tmp_path / "bad.safetensors"
    path.write_bytes(damaged)
    try:
        file = open_safetensors(path)
    except FormatError:
        return
    for name, found in file.tensors.items():
        assert file.array(name).nbytes == found.size_bytes
        file.array(name).tobytes()


@pytest.mark.parametrize("name", ["x.safetensors", "x.gguf"])
def test_a_file_that_cannot_be_mapped_is_named(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **options: object) -> None:
        raise OSError(errno.ENOMEM, "Cannot allocate memory")

    path = tmp_path / name
    save_file({"a": np.zeros(3, np.float32)}, path)
    monkeypatch.setattr(mmap, "mmap", refuse)
    with pytest.raises(OSError, match="Cannot allocate memory") as raised:
        open_gguf(path) if path.suffix == ".gguf" else open_safetensors(path)
    assert raised.value.filename == str(path)
