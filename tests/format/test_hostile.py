"""Damaged and malicious folders: a named error, or the checksum notices; never a crash."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from entrollm import _core
from entrollm.errors import CorruptStreamError, FormatError, UnsupportedError
from entrollm.format import layout
from entrollm.format.reader import CompressedModel, is_compressed, read_config
from entrollm.matrix import matrix_of
from tests.support.folders import (
    CONSTANT,
    MULTI_ROW,
    NORM,
    SPLIT_ROW,
    Header,
    change_entries,
    change_header,
    change_spec,
    check_all,
    contents,
    harmless_flips,
    read_entry,
    read_safetensors,
    refuse,
    write_config,
    write_example,
    write_safetensors,
    write_sharded_example,
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_example(tmp_path / "model")


def test_truncation_anywhere_is_refused(folder: Path, file: Path) -> None:
    content = file.read_bytes()
    points = {0, 1, 7, 8, 9, len(content) - 1} | set(range(0, len(content), len(content) // 97))
    for size in points:
        file.write_bytes(content[:size])
        with pytest.raises(FormatError, match=r"model\.safetensors"):
            CompressedModel.open(folder)


def test_a_longer_file_is_refused(folder: Path, file: Path) -> None:
    file.write_bytes(file.read_bytes() + b"\x00")
    refuse(folder, FormatError, "the tensors end at byte")


def test_a_flipped_bit_of_the_header_is_refused_or_harmless(folder: Path, file: Path) -> None:
    header_bytes = 8 + int.from_bytes(file.read_bytes()[:8], "little")
    harmless = harmless_flips(folder, file, range(header_bytes), np.random.default_rng(5))
    assert harmless <= 12  # "pt", and whitespace that stays whitespace


def test_a_flipped_bit_of_the_data_fails_its_checksum(folder: Path, file: Path) -> None:
    content = file.read_bytes()
    header_bytes = 8 + int.from_bytes(content[:8], "little")
    generator = np.random.default_rng(6)
    for at in generator.choice(np.arange(header_bytes, len(content)), 200, replace=False):
        damaged = bytearray(content)
        damaged[at] ^= 1 << int(generator.integers(8))
        file.write_bytes(damaged)
        with pytest.raises(CorruptStreamError, match=r"have CRC-32 [0-9a-f]{8}, expected [0-9a-f]{8}; the file is dam"):
            check_all(folder)
        try:
            contents(folder)
        except FormatError as error:
            assert "model" in str(error) or ".weight" in str(error)


def test_noise_in_the_streams_never_crashes(folder: Path, file: Path) -> None:
    header, _ = read_safetensors(file)
    generator = np.random.default_rng(7)
    refused = 0
    for _ in range(60):
        name = str(generator.choice([MULTI_ROW, SPLIT_ROW]))
        suffix = str(generator.choice([".dense", ".sparse"]))
        size = header[name + suffix]["shape"][0]
        fill = generator.choice(np.array([0, 255], np.uint8), size)
        noise = generator.integers(0, 256, size, np.uint8) if generator.integers(2) else fill
        write_example(folder)
        change_entries(file, {name + suffix: ("U8", noise)})
        try:
            contents(folder)
        except CorruptStreamError as error:
            assert str(error).startswith(f"{name}: ")
            assert str(error).endswith("the file is damaged, compress or fetch it again")
            refused += 1
    assert refused > 40


def test_swapped_block_sizes_are_refused(folder: Path, file: Path) -> None:
    sizes = read_entry(file, SPLIT_ROW + ".sparse_sizes", np.uint16)
    assert sizes[0] != sizes[1]
    change_entries(file, {SPLIT_ROW + ".sparse_sizes": ("U16", sizes[[1, 0, *range(2, sizes.size)]])})
    refuse(folder, CorruptStreamError, "does not decode to its stated length")


def test_oversized_block_sizes_are_refused(folder: Path, file: Path) -> None:
    sizes = read_entry(file, SPLIT_ROW + ".sparse_sizes", np.uint16)
    change_entries(file, {SPLIT_ROW + ".sparse_sizes": ("U16", np.full_like(sizes, 65535))})
    refuse(folder, FormatError, rf"{SPLIT_ROW}: the sparse stream has \d+ bytes, expected \d+; the file is damaged")


@pytest.mark.parametrize("change", [-1, 1])
def test_a_wrong_number_of_block_sizes_is_refused(folder: Path, file: Path, change: int) -> None:
    sizes = read_entry(file, SPLIT_ROW + ".sparse_sizes", np.uint16)
    other = np.resize(sizes, sizes.size + change)
    change_entries(file, {SPLIT_ROW + ".sparse_sizes": ("U16", other)})
    refuse(folder, FormatError, f"there are {other.size} sparse block sizes, expected {sizes.size}")


@pytest.mark.parametrize("suffix", [".dense", ".sparse"])
@pytest.mark.parametrize("change", [-64, 64])
def test_a_stream_of_another_size_is_refused(folder: Path, file: Path, suffix: str, change: int) -> None:
    stream = read_entry(file, MULTI_ROW + suffix, np.uint8)
    change_entries(file, {MULTI_ROW + suffix: ("U8", np.resize(stream, stream.size + change))})
    refuse(folder, FormatError, f"the {suffix[1:]} stream has {stream.size + change} bytes, expected {stream.size}")


@pytest.mark.parametrize("suffix", [".dense", ".sparse", ".sparse_sizes"])
def test_a_missing_stream_is_refused(folder: Path, file: Path, suffix: str) -> None:
    change_entries(file, {SPLIT_ROW + suffix: None})
    what = "there are 0 sparse block sizes" if suffix == ".sparse_sizes" else f"the {suffix[1:]} stream has 64 bytes"
    refuse(folder, FormatError, what)


BAD_ENTRIES = {
    "dtype of a stream": (MULTI_ROW + ".dense", "I8", np.zeros(512, np.int8), "'a.weight.dense' is I8"),
    "dtype of sizes": (MULTI_ROW + ".sparse_sizes", "I16", np.zeros(1, np.int16), "expected one axis of U16"),
    "dtype of scales": (SPLIT_ROW + ".scale", "F64", np.ones(3), "expected one axis of F32"),
    "axes of a stream": (
        MULTI_ROW + ".dense",
        "U8",
        np.zeros((8, 64), np.uint8),
        r"is U8 \[8, 64\], expected one axis",
    ),
    "empty sizes": (MULTI_ROW + ".sparse_sizes", "U16", np.zeros(0, np.uint16), "is empty; empty entries are left out"),
    "empty stream": (CONSTANT + ".dense", "U8", np.zeros(64, np.uint8), "is empty; empty entries are left out"),
    "needless stream": (CONSTANT + ".sparse", "U8", np.zeros(128, np.uint8), "the sparse stream has 128 bytes, exp"),
    "needless sizes": (CONSTANT + ".sparse_sizes", "U16", np.zeros(1, np.uint16), "1 sparse block sizes, expected 0"),
    "second scale": (MULTI_ROW + ".scale", "F32", np.ones(1, np.float32), "its scale is both in the spec and stored"),
    "second offset": (MULTI_ROW + ".offset", "F32", np.ones(1, np.float32), "its offset is both in the spec and sto"),
    "few scales": (SPLIT_ROW + ".scale", "F32", np.ones(2, np.float32), "scale needs one entry or one a row"),
    "many offsets": (SPLIT_ROW + ".offset", "F32", np.ones(4, np.float32), "offset needs one entry or one a row"),
    "few columns": (
        SPLIT_ROW + ".column_scale",
        "F32",
        np.ones(9, np.float32),
        "column_scale needs one entry a column",
    ),
    "nan scale": (
        SPLIT_ROW + ".scale",
        "F32",
        np.array([1, np.nan, 1], np.float32),
        "its scale has a value that is not finite",
    ),
    "infinite offset": (
        SPLIT_ROW + ".offset",
        "F32",
        np.full(3, np.inf, np.float32),
        "its offset has a value that is not finite",
    ),
    "stray entry": ("d.weight.dense", "U8", np.zeros(128, np.uint8), "'d.weight.dense' belongs to no tensor that"),
    "stray tensor": ("d.weight", "F32", np.zeros(2, np.float32), "the entry 'd.weight' belongs to no tensor"),
    "coded and plain": (MULTI_ROW, "F32", np.zeros(2, np.float32), "'a.weight' is stored both coded and plain"),
}


@pytest.mark.parametrize("case", BAD_ENTRIES)
def test_a_bad_entry_is_refused(folder: Path, file: Path, case: str) -> None:
    name, dtype, array, message = BAD_ENTRIES[case]
    change_entries(file, {name: (dtype, array)})
    refuse(folder, FormatError, message)


def test_a_missing_scale_is_refused(folder: Path, file: Path) -> None:
    change_entries(file, {SPLIT_ROW + ".scale": None})
    refuse(folder, FormatError, "neither its spec nor the entry 'b.weight.scale' gives its scale")


def test_a_missing_plain_tensor_is_refused(folder: Path, file: Path) -> None:
    change_entries(file, {NORM: None})
    refuse(folder, FormatError, f"tensor '{NORM}' is listed but not stored")


BAD_SPECS: dict[str, tuple[dict[str, Any], str]] = {
    "more rows": ({"shape": [2**31, 100]}, "the dense stream has"),
    "more columns": ({"shape": [10, 200]}, "the dense stream has 576 bytes, expected 1024"),
    "fewer columns": ({"shape": [10, 64]}, "block columns do not fit the matrix"),
    "fewer rows": ({"shape": [4, 100]}, "the dense stream has"),
    "absurd product": ({"shape": [2**31, 2**31]}, "more than the format allows"),
    "absurd padding": ({"shape": [2**31, 129], "block": [1, 128]}, "the dense stream has"),
    "absurd width": ({"shape": [3, 2**31], "block": [1, 64]}, "the dense stream has"),
    "wide block": ({"block": [1, 8192]}, "block sizes are out of range"),
    "large block": ({"block": [8192, 128]}, "block sizes are out of range"),
    "narrow block": ({"block": [10, 64]}, "the dense stream has 576 bytes, expected 640"),
    "broad block": ({"block": [10, 192]}, "block columns do not fit the matrix"),
    "odd block": ({"block": [1, 100]}, "block sizes are out of range"),
    "one-row blocks": ({"block": [1, 128]}, "the dense stream has 576 bytes, expected 896"),
    "other code": ({"code": {"bits": 4, "symbols": [0] * 16}}, "the dense stream has"),
    "more low bits": ({"low_bits": 1}, "the dense stream has"),
    "trellis": ({"trellis": True}, "its spec has a trellis, which format version 1 does not have"),
    "no scale": ({"scale": None}, "neither its spec nor the entry"),
}


@pytest.mark.parametrize("case", BAD_SPECS)
def test_a_spec_that_does_not_fit_its_entries_is_refused(folder: Path, file: Path, case: str) -> None:
    changes, message = BAD_SPECS[case]
    change_spec(file, MULTI_ROW, **changes)
    refuse(folder, FormatError, message)


def test_a_spec_without_entries_is_refused(folder: Path, file: Path) -> None:
    def change(header: Header) -> None:
        header["__metadata__"]["d.weight"] = header["__metadata__"][MULTI_ROW]

    change_header(file, change)
    refuse(folder, FormatError, "d.weight: the dense stream has 64 bytes")


def test_a_changed_spec_fails_its_checksum(folder: Path, file: Path) -> None:
    change_spec(file, MULTI_ROW, scale=0.26)
    contents(folder)
    with pytest.raises(CorruptStreamError, match=r"the bytes of 'a\.weight' have CRC-32"):
        check_all(folder)


@pytest.mark.parametrize("name", [CONSTANT, MULTI_ROW])
def test_absurd_sizes_take_no_memory(folder: Path, file: Path, name: str) -> None:
    """A matrix that needs no bytes may claim any shape: opening it must cost nothing."""
    change_spec(file, name, shape=[2**31, 512], block=[1, 512], code=9, low_bits=None)
    if name == MULTI_ROW:
        change_entries(file, {name + suffix: None for suffix in (".dense", ".sparse", ".sparse_sizes")})
    with CompressedModel.open(folder) as model:
        matrix = matrix_of(model, name)
        last = 2**31 - 1
        assert (matrix.symbols(last, last + 1, _core.ThreadPool(1)) == 9).all()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits of memory differ elsewhere")
def test_absurd_widths_take_no_memory(folder: Path, file: Path) -> None:
    import resource

    change_spec(file, CONSTANT, shape=[512, 2**31], block=[128, 64], code=9, low_bits=None)
    status = Path("/proc/self/status").read_text()
    data_bytes = next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmData"))
    earlier = resource.getrlimit(resource.RLIMIT_DATA)
    with CompressedModel.open(folder) as model:
        resource.setrlimit(resource.RLIMIT_DATA, (data_bytes + (100 << 20), earlier[1]))
        try:
            assert matrix_of(model, CONSTANT).spec.columns == 2**31
        finally:
            resource.setrlimit(resource.RLIMIT_DATA, earlier)


BAD_METADATA: dict[str, tuple[Callable[[dict[str, str]], Any], type[Exception], str]] = {
    "no version": (lambda m: m.pop("entrollm.version"), FormatError, "its header has no 'entrollm.version'"),
    "newer version": (
        lambda m: m.update({"entrollm.version": "3"}),
        UnsupportedError,
        "format version '3'; this EntroLLM reads 1 and 2",
    ),
    "no list": (lambda m: m.pop("entrollm.plain"), FormatError, "its header has no 'entrollm.plain'"),
    "bad list": (lambda m: m.update({"entrollm.plain": "["}), FormatError, "entrollm.plain is not valid JSON"),
    "duplicate in the list": (
        lambda m: m.update({"entrollm.plain": '{"a":"00000000","a":"00000000"}'}),
        FormatError,
        "entrollm.plain has the key 'a' twice",
    ),
    "number in the list": (
        lambda m: m.update({"entrollm.plain": '{"norm.weight":1}'}),
        FormatError,
        "the CRC-32 of 'norm.weight' must be 8 hex digits, found 1",
    ),
    "short in the list": (
        lambda m: m.update({"entrollm.plain": '{"norm.weight":"1"}'}),
        FormatError,
        "the CRC-32 of 'norm.weight' must be 8 hex digits",
    ),
    "coded in the list": (
        lambda m: m.update({"entrollm.plain": m["entrollm.plain"][:-1] + ',"a.weight.dense":"00000000"}'}),
        FormatError,
        "'a.weight.dense' is stored both coded and plain",
    ),
    "something else": (lambda m: m.update({"author": "me"}), FormatError, "author: the stored spec is not valid JSON"),
}


@pytest.mark.parametrize("case", BAD_METADATA)
def test_bad_metadata_is_refused(folder: Path, file: Path, case: str) -> None:
    change, error, message = BAD_METADATA[case]
    change_header(file, lambda header: change(header["__metadata__"]))
    refuse(folder, error, message)


def test_a_duplicate_tensor_is_refused(folder: Path, file: Path) -> None:
    header, data = read_safetensors(file)
    text = json.dumps(header).encode()
    text = text[:-1] + b', "norm.weight": ' + json.dumps(header[NORM]).encode() + b"}"
    file.write_bytes(len(text).to_bytes(8, "little") + text + data)
    refuse(folder, FormatError, "has the key 'norm.weight' twice")


def test_a_file_without_metadata_is_refused(folder: Path, file: Path) -> None:
    header, data = read_safetensors(file)
    del header["__metadata__"]
    write_safetensors(file, header, data)
    refuse(folder, FormatError, "its header has no 'entrollm.version'")


def test_a_missing_shard_is_refused(tmp_path: Path) -> None:
    path = write_sharded_example(tmp_path / "model")
    (path / "model-00002-of-00002.safetensors").unlink()
    refuse(path, FormatError, "shard model-00002-of-00002.safetensors is missing")


def test_a_matrix_in_two_shards_is_refused(tmp_path: Path) -> None:
    """The index cannot show it: a constant matrix has no entries of its own."""
    path = write_sharded_example(tmp_path / "model")
    second, _ = read_safetensors(path / "model-00002-of-00002.safetensors")

    def change(header: Header) -> None:
        header["__metadata__"][CONSTANT] = second["__metadata__"][CONSTANT]

    change_header(path / "model-00001-of-00002.safetensors", change)
    refuse(path, FormatError, "tensor 'c.weight' is in two shards")


def test_an_entry_in_two_shards_is_refused(tmp_path: Path) -> None:
    path = write_sharded_example(tmp_path / "model")
    first = path / "model-00001-of-00002.safetensors"
    change_entries(path / "model-00002-of-00002.safetensors", {NORM: ("U8", read_entry(first, NORM, np.uint8))})
    refuse(path, FormatError, r"'norm\.weight' is in two shards")


def test_entries_in_another_shard_than_their_spec_are_refused(tmp_path: Path) -> None:
    path = write_sharded_example(tmp_path / "model")
    first, second = (path / f"model-0000{i}-of-00002.safetensors" for i in (1, 2))
    moved = MULTI_ROW + ".sparse_sizes"
    sizes = read_entry(first, moved, np.uint16)
    change_entries(first, {moved: None})
    change_entries(second, {moved: ("U16", sizes)})
    index = json.loads((path / layout.INDEX_NAME).read_text())
    index["weight_map"][moved] = second.name
    (path / layout.INDEX_NAME).write_text(json.dumps(index))
    refuse(path, FormatError, f"the entry '{moved}' belongs to no tensor")


@pytest.mark.parametrize("version", [0, 3, "1", 1.0, True, None])
def test_another_version_is_refused(folder: Path, version: object) -> None:
    write_config(folder, version=version)
    refuse(folder, UnsupportedError, r"config.json: format version .*; this EntroLLM reads 1 and 2")


def test_a_folder_that_is_not_compressed_is_refused(folder: Path) -> None:
    for config in ({}, {"quantization_config": 5}, {"quantization_config": {"quant_method": "gptq"}}):
        (folder / "config.json").write_text(json.dumps(config))
        assert not is_compressed(config)
        refuse(folder, ValueError, "is not a compressed model; `entrollm compress .* -o OUT` makes one")


def test_a_bad_config_is_refused(folder: Path, tmp_path: Path) -> None:
    (folder / "config.json").write_text("{")
    refuse(folder, FormatError, "config.json: the configuration is not valid JSON")
    (folder / "config.json").unlink()
    refuse(folder, FormatError, "has no config.json; expected a model folder")
    with pytest.raises(ValueError, match="is missing; expected a model folder"):
        read_config(tmp_path / "nothing")
    (tmp_path / "model.gguf").touch()
    with pytest.raises(ValueError, match=r"is a GGUF file; `entrollm compress \S+ -o OUT` makes a folder of it"):
        read_config(tmp_path / "model.gguf")
    with pytest.raises(ValueError, match="is a file; expected a model folder"):
        read_config(folder / "model.safetensors")


def test_a_folder_without_weights_is_refused(folder: Path) -> None:
    shutil.move(folder / "model.safetensors", folder / "other.txt")
    refuse(folder, FormatError, "has no weights")
