"""What is written is what is read, and any safetensors reader can look at it."""

from __future__ import annotations

import json
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from entrollm import _core
from entrollm.codec import reference
from entrollm.format import layout
from entrollm.format.blocks import Blocks
from entrollm.format.grid import GridKind
from entrollm.format.reader import CompressedModel
from entrollm.format.spec import TensorSpec
from entrollm.format.stored import store_matrix
from entrollm.format.writer import ShardWriter
from entrollm.matrix import matrix_of, multiply
from tests.support.folders import (
    BIAS,
    CONSTANT,
    MULTI_ROW,
    NORM,
    SPLIT_ROW,
    change_entries,
    check_all,
    contents,
    example_plain,
    example_symbols,
    example_tensors,
    read_entry,
    read_safetensors,
    write_config,
    write_example,
    write_sharded_example,
)
from tests.support.matrices import block_shapes, codes, shapes, store, symbol_matrices


@pytest.mark.parametrize("write", [write_example, write_sharded_example])
def test_everything_comes_back(tmp_path: Path, write: type) -> None:
    path = write(tmp_path / "model")
    pool = _core.ThreadPool(2)
    symbols, tensors, plain = example_symbols(), example_tensors(), example_plain()
    with CompressedModel.open(path) as model:
        assert set(model.specs) == {MULTI_ROW, SPLIT_ROW, CONSTANT}
        assert set(model.plain) == {NORM, BIAS}
        for name, expected in symbols.items():
            spec, arrays = tensors[name]
            matrix = matrix_of(model, name)
            np.testing.assert_array_equal(matrix.symbols(0, spec.rows, pool), expected)
            assert matrix.spec.code == spec.code and matrix.spec.checksum == model.specs[name].checksum
            assert matrix.stored_bytes == sum(array.nbytes for array in arrays.values())
        for name, array in plain.items():
            assert model.array(name).tobytes() == array.tobytes()
            assert model.array(name).shape == array.shape
            assert model.dtype(name) == ("BF16" if name == NORM else "F32")
        assert model.file_bytes() == sum(file.stat().st_size for file in path.glob("*.safetensors"))
    check_all(path)


def test_scales_apply_as_documented(tmp_path: Path) -> None:
    symbols, tensors = example_symbols(), example_tensors()
    with CompressedModel.open(write_example(tmp_path / "model")) as model:
        pool = _core.ThreadPool(1)
        rows = np.array([9, 0], np.int64)
        values = symbols[MULTI_ROW][rows].astype(np.float32) * np.float32(0.25) + np.float32(-1.5)
        np.testing.assert_array_equal(matrix_of(model, MULTI_ROW).dequantize(rows, pool), values)
        stored = tensors[SPLIT_ROW][1]
        values = symbols[SPLIT_ROW].astype(np.float32) * stored[layout.SCALE][:, None]
        values = (values + stored[layout.OFFSET][:, None]) * stored[layout.COLUMN_SCALE]
        np.testing.assert_array_equal(matrix_of(model, SPLIT_ROW).dequantize(np.arange(3), pool), values)
        constant = matrix_of(model, CONSTANT).dequantize(np.arange(7), pool)
        np.testing.assert_array_equal(constant, np.full((7, 3), 9 * 0.25, np.float32))
        product = multiply([matrix_of(model, CONSTANT)], np.ones((1, 3), np.float32), pool)
        np.testing.assert_allclose(product, np.full((1, 7), 27 * 0.25), rtol=2e-5)


def test_the_safetensors_package_reads_every_entry(tmp_path: Path) -> None:
    file = write_example(tmp_path / "model") / "model.safetensors"
    with safe_open(file, "np") as opened:
        assert opened.metadata()["entrollm.version"] == "1"
        for name, (_, arrays) in example_tensors().items():
            for suffix, array in arrays.items():
                if array.size:
                    np.testing.assert_array_equal(opened.get_tensor(name + suffix), array)
                else:
                    assert name + suffix not in opened.keys()  # noqa: SIM118 (it has no __contains__)
        np.testing.assert_array_equal(opened.get_tensor(BIAS), example_plain()[BIAS])


def test_streams_are_aligned_in_the_file(tmp_path: Path) -> None:
    file = write_example(tmp_path / "model") / "model.safetensors"
    header, data = read_safetensors(file)
    data_begin = file.stat().st_size - len(data)
    streams = [name for name in header if name.endswith(layout.STREAMS)]
    assert len(streams) == 4
    for name in streams:
        begin, end = header[name]["data_offsets"]
        assert (data_begin + begin) % 64 == 0
        assert (end - begin) % 64 == 0


def test_streams_are_not_copied(tmp_path: Path) -> None:
    with CompressedModel.open(write_example(tmp_path / "model")) as model:
        first, second = model.entries(SPLIT_ROW), model.entries(SPLIT_ROW)
        for suffix in layout.STREAMS:
            assert not first[suffix].flags.owndata and np.shares_memory(first[suffix], second[suffix])


def test_matrices_outlive_their_model(tmp_path: Path) -> None:
    model = CompressedModel.open(write_example(tmp_path / "model"))
    matrix = matrix_of(model, MULTI_ROW)
    model.release(MULTI_ROW)
    model.close()
    decoded = matrix.symbols(0, 10, _core.ThreadPool(1))
    np.testing.assert_array_equal(decoded, example_symbols()[MULTI_ROW])


def test_entries_may_lie_anywhere(tmp_path: Path) -> None:
    """Alignment is for speed: another tool may rewrite the file with entries at odd offsets."""
    path = write_example(tmp_path / "model")
    before = contents(path)
    file = path / "model.safetensors"
    sizes = read_entry(file, SPLIT_ROW + ".sparse_sizes", np.uint16)
    dense = read_entry(file, SPLIT_ROW + ".dense", np.uint8)
    change_entries(file, {SPLIT_ROW + ".sparse_sizes": None, SPLIT_ROW + ".dense": None})
    header, data = read_safetensors(file)
    odd = b"\x07"
    header["z"] = {"dtype": "U8", "shape": [1], "data_offsets": [len(data), len(data) + 1]}
    header["__metadata__"]["entrollm.plain"] = json.dumps(
        json.loads(header["__metadata__"]["entrollm.plain"]) | {"z": f"{layout.zlib.crc32(odd):08x}"}
    )
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + data + odd)
    change_entries(file, {SPLIT_ROW + ".sparse_sizes": ("U16", sizes), SPLIT_ROW + ".dense": ("U8", dense)})
    header, _ = read_safetensors(file)
    assert header[SPLIT_ROW + ".sparse_sizes"]["data_offsets"][0] % 2 == 1
    assert {name: value for name, value in contents(path).items() if name != "z"} == before
    check_all(path)


@settings(max_examples=50, deadline=None)
@given(st.data())
def test_any_matrix_round_trips_through_a_file(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    path = tmp_path_factory.mktemp("model")
    write_config(path)
    code = data.draw(codes())
    rows, columns = data.draw(shapes(3000))
    blocks = data.draw(block_shapes(rows, columns))
    symbols = data.draw(symbol_matrices(code, (rows, columns)))
    stored = store(code, symbols, blocks)
    spec = TensorSpec(rows, columns, "F32", "any", code, blocks, GridKind(1.0))
    arrays = {layout.DENSE: stored.dense, layout.SPARSE: stored.sparse, layout.SPARSE_SIZES: stored.sizes}
    name = data.draw(st.text('abc./"\\é\n', min_size=1)) + "weight"
    with ShardWriter(path / "model.safetensors") as writer:
        matrix = store_matrix(name, spec, arrays)
        writer.add_matrix(matrix)
        writer.add_plain("empty", "F16", (0, 5), [])
        writer.add_plain("scalar", "F32", (), [np.array(2.5, np.float32)])
    with CompressedModel.open(path) as model:
        assert model.specs[name] == matrix.spec
        decoded = matrix_of(model, name).symbols(0, rows, _core.ThreadPool(1))
        np.testing.assert_array_equal(decoded, symbols)
        assert model.array("empty").shape == (0, 5)
        assert model.array("scalar") == 2.5
        for each in (name, "empty", "scalar"):
            model.check_checksum(each)
        found = model.matrix_arrays(name)
        streams = [found[s].tobytes() if s in found else b"" for s in layout.STREAMS]
        sizes = found[layout.SPARSE_SIZES].tolist() if layout.SPARSE_SIZES in found else []
    assert reference.decode_matrix(code, (rows, columns), blocks, *streams, sizes) == symbols.tolist()


def test_a_stream_is_padded_for_wide_loads() -> None:
    for size, stored in ((1, 128), (64, 128), (65, 192), (128, 192)):
        padded = layout.padded_stream([np.full(size, 7, np.uint8)])
        assert padded.size == stored
        assert padded[:size].tolist() == [7] * size and not padded[size:].any()
    assert layout.padded_stream([]).size == 0


def test_shards_are_named_as_transformers_names_them() -> None:
    assert layout.shard_name(0, 1) == "model.safetensors"
    assert layout.shard_name(2, 12) == "model-00003-of-00012.safetensors"


def test_a_plain_tensor_may_come_in_chunks(tmp_path: Path) -> None:
    write_config(tmp_path)
    whole = np.arange(60, dtype=np.float32).reshape(12, 5).astype(ml_dtypes.bfloat16)
    with ShardWriter(tmp_path / "model.safetensors") as writer:
        assert writer.add_plain("w", "BF16", (12, 5), [whole[:1], whole[1:7], whole[7:]]) == whole.nbytes
    with CompressedModel.open(tmp_path) as model:
        assert model.array("w").tobytes() == whole.tobytes()
        model.check_checksum("w")


def test_an_ordinary_file_says_nothing_of_the_format(tmp_path: Path) -> None:
    with ShardWriter(tmp_path / "model.safetensors", ordinary=True) as writer:
        writer.add_plain("w", "F32", (2,), [np.ones(2, np.float32)])
    header, _ = read_safetensors(tmp_path / "model.safetensors")
    assert header["__metadata__"] == {"format": "pt"}


def test_two_entries_of_one_name_are_refused(tmp_path: Path) -> None:
    spec, arrays = example_tensors()[CONSTANT]
    one = [np.ones(1, np.float32)]
    writer = ShardWriter(tmp_path / "model.safetensors")
    writer.add_matrix(store_matrix("w", spec, arrays))
    # No scale is stored for w, yet a reader would take this for it.
    for name in ("w", "w.scale", "w.dense"):
        with pytest.raises(ValueError, match=f"two entries are called '{name}'"):
            writer.add_plain(name, "F32", (1,), one)
    with pytest.raises(ValueError, match="two entries are called 'w'"):
        writer.add_matrix(store_matrix("w", spec, arrays))


def test_a_failed_write_leaves_nothing(tmp_path: Path) -> None:
    def fail(path: Path) -> None:
        with ShardWriter(path) as writer:
            writer.add_plain("w", "F32", (1,), [np.ones(1, np.float32)])
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        fail(tmp_path / "model.safetensors")
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_name_is_a_key_error(tmp_path: Path) -> None:
    with CompressedModel.open(write_example(tmp_path / "model")) as model:
        for call in (
            lambda name: matrix_of(model, name),
            model.array,
            model.dtype,
            model.entries,
            model.check_checksum,
        ):
            with pytest.raises(KeyError):
                call("nothing")


def test_blocks_of_the_example_cover_what_they_should() -> None:
    specs = {name: spec for name, (spec, _) in example_tensors().items()}
    assert specs[MULTI_ROW].blocks == Blocks(10, 128)
    assert specs[SPLIT_ROW].blocks == Blocks(3, 2560)
