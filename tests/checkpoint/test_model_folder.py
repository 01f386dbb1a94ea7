"""Checkpoint folders: shards, rows, fp8 scales, side files, and every folder that must be refused."""

import json
import mmap
import os
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from entrollm.checkpoint.model_folder import Checkpoint
from entrollm.errors import FormatError, UnsupportedError
from tests.support.paths import TINY_LLAMA

A = np.arange(12, dtype=np.float32).reshape(4, 3)
B = np.arange(8, dtype=np.float32).reshape(2, 4).astype(ml_dtypes.bfloat16)


def write_config(folder: Path, **config: Any) -> None:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", **config}))


def write_single(folder: Path, tensors: dict[str, np.ndarray], **config: Any) -> Path:
    write_config(folder, **config)
    save_file(tensors, folder / "model.safetensors")
    return folder


def write_sharded(folder: Path, shards: list[dict[str, np.ndarray]], weight_map: dict[str, Any] | None = None) -> Path:
    write_config(folder)
    names = [f"model-{number + 1:05}-of-{len(shards):05}.safetensors" for number in range(len(shards))]
    for name, tensors in zip(names, shards, strict=True):
        save_file(tensors, folder / name)
    if weight_map is None:
        weight_map = {tensor: name for name, tensors in zip(names, shards, strict=True) for tensor in tensors}
    write_index(folder, weight_map)
    return folder


def write_index(folder: Path, weight_map: Any) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def fp8(values: Any, dtype: Any = ml_dtypes.float8_e4m3fn) -> np.ndarray:
    return np.asarray(values, np.float32).astype(dtype)


def save_fp8(folder: Path, tensors: dict[str, np.ndarray], quantization: dict[str, Any] | None = None) -> Path:
    """Save tensors of which some are fp8, whose names safetensors.numpy does not know."""
    header, data = {}, b""
    names = {"float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2", "float32": "F32", "bfloat16": "BF16"}
    names |= {"int8": "I8", "float8_e8m0fnu": "F8_E8M0"}
    for name, array in tensors.items():
        begin, data = len(data), data + array.tobytes()
        header[name] = {"dtype": names[array.dtype.name], "shape": array.shape, "data_offsets": [begin, len(data)]}
    text = json.dumps(header).encode()
    write_config(folder, quantization_config=quantization or {"quant_method": "fp8"})
    (folder / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + data)
    return folder


def test_the_example_model_opens() -> None:
    with Checkpoint.open(TINY_LLAMA) as checkpoint:
        assert checkpoint.config["model_type"] == "llama"
        assert sum(np.prod(info.shape, dtype=int) for info in checkpoint.tensors.values()) == 15_735_168
        embedding = checkpoint.tensors["model.embed_tokens.weight"]
        assert (embedding.dtype, embedding.shape) == ("BF16", (8192, 384))
        assert embedding.size_bytes == 8192 * 384 * 2
        rows = checkpoint.read_float32("model.embed_tokens.weight", 100, 103)
        whole = checkpoint.read("model.embed_tokens.weight")
        np.testing.assert_array_equal(rows, whole[100:103].astype(np.float32))
        assert [file.name for file in checkpoint.side_files()] == [
            "README.md",
            "config.json",
            "generation_config.json",
            "special_tokens_map.json",
            "tokenizer.json",
            "tokenizer_config.json",
            "train_log.json",
        ]


def test_shards_read_like_one_file(tmp_path: Path) -> None:
    single = Checkpoint.open(write_single(tmp_path / "single", {"a": A, "b": B}))
    sharded = Checkpoint.open(write_sharded(tmp_path / "sharded", [{"a": A}, {"b": B}]))
    assert list(single.tensors) == list(sharded.tensors) == ["a", "b"]
    for checkpoint in (single, sharded):
        np.testing.assert_array_equal(checkpoint.read("a"), A)
        np.testing.assert_array_equal(checkpoint.read("b"), B)
    assert sharded.tensors["b"].file.name == "model-00002-of-00002.safetensors"


def test_an_index_may_name_the_single_file(tmp_path: Path) -> None:
    folder = write_single(tmp_path / "m", {"a": A})
    write_index(folder, {"a": "model.safetensors"})
    assert list(Checkpoint.open(folder).tensors) == ["a"]


def test_rows_are_views_and_float32_rows_are_copies(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(write_single(tmp_path / "m", {"a": A, "s": np.array(3, np.float16)}))
    assert not checkpoint.read("a", 1, 3).flags.owndata
    np.testing.assert_array_equal(checkpoint.read("a", 1, 3), A[1:3])
    np.testing.assert_array_equal(checkpoint.read("a", 2), A[2:])
    copy = checkpoint.read_float32("a", 1, 2)
    copy += 1
    np.testing.assert_array_equal(checkpoint.read("a"), A)
    assert checkpoint.read_float32("s") == 3


@pytest.mark.parametrize(("start", "stop"), [(0, 5), (-1, 2), (3, 2), (5, 5)])
def test_rows_outside_the_tensor_are_refused(tmp_path: Path, start: int, stop: int) -> None:
    checkpoint = Checkpoint.open(write_single(tmp_path / "m", {"a": A}))
    with pytest.raises(ValueError, match=r"tensor 'a' has 4 rows; .* is outside of them"):
        checkpoint.read("a", start, stop)


def test_an_unknown_tensor_is_a_key_error(tmp_path: Path) -> None:
    with pytest.raises(KeyError, match="nothing"):
        Checkpoint.open(write_single(tmp_path / "m", {"a": A})).read("nothing")


def test_integers_have_no_float32_values(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(write_single(tmp_path / "m", {"a": np.ones(3, np.int64)}))
    with pytest.raises(UnsupportedError, match="tensor 'a' is I64; expected one of BF16"):
        checkpoint.read_float32("a")


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="resident memory is read from /proc")
def test_release_gives_resident_memory_back(tmp_path: Path) -> None:
    size = 64 << 20
    checkpoint = Checkpoint.open(write_single(tmp_path / "m", {"a": np.ones(size // 4, np.float32)}))
    before = resident_bytes()
    checkpoint.read("a").max()
    assert resident_bytes() - before > size * 0.9
    checkpoint.release("a")
    assert resident_bytes() - before < size * 0.1


def resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * mmap.PAGESIZE


def test_views_outlive_the_checkpoint(tmp_path: Path) -> None:
    with Checkpoint.open(write_single(tmp_path / "m", {"a": A})) as checkpoint:
        view = checkpoint.read("a")
        checkpoint.release("a")
    np.testing.assert_array_equal(view, A)


@pytest.mark.parametrize("dtype", [ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2])
@pytest.mark.parametrize("block", [None, [2, 3]])
def test_block_scales_multiply_their_blocks(tmp_path: Path, dtype: Any, block: list[int] | None) -> None:
    rows, columns = (5, 7) if block else (130, 260)
    block_rows, block_columns = block or (128, 128)
    generator = np.random.default_rng(0)
    weight = fp8(generator.standard_normal((rows, columns)), dtype)
    scale = generator.random((-(-rows // block_rows), -(-columns // block_columns))).astype(np.float32)
    quantization = {"quant_method": "fp8", **({"weight_block_size": block} if block else {})}
    folder = save_fp8(tmp_path / "m", {"x.weight": weight, "x.weight_scale_inv": scale}, quantization)
    checkpoint = Checkpoint.open(folder)
    assert list(checkpoint.tensors) == ["x.weight"]
    assert checkpoint.has_scales("x.weight")
    row, column = np.arange(rows)[:, None] // block_rows, np.arange(columns)[None] // block_columns
    expected = weight.astype(np.float32) * scale[row, column]
    np.testing.assert_array_equal(checkpoint.read_float32("x.weight"), expected)
    for start in range(rows):
        for stop in (start + 1, rows):
            np.testing.assert_array_equal(checkpoint.read_float32("x.weight", start, stop), expected[start:stop])


@pytest.mark.parametrize("shape", [(), (1,), (4,), (4, 1)])
def test_scales_per_tensor_and_per_row_multiply(tmp_path: Path, shape: tuple[int, ...]) -> None:
    weight = fp8(np.arange(12).reshape(4, 3))
    scale = (np.arange(np.prod(shape, dtype=int)) + 2).astype(ml_dtypes.bfloat16).reshape(shape)
    tensors = {"x.weight": weight, "x.weight_scale": scale, "x.input_scale": np.ones(1, np.float32)}
    groups = {"group_0": {"weights": {"type": "float", "num_bits": 8}}}
    folder = save_fp8(tmp_path / "m", tensors, {"quant_method": "compressed-tensors", "config_groups": groups})
    checkpoint = Checkpoint.open(folder)
    assert list(checkpoint.tensors) == ["x.weight"]
    column = scale.astype(np.float32).reshape(-1, 1)
    np.testing.assert_array_equal(checkpoint.read_float32("x.weight"), weight.astype(np.float32) * column)
    np.testing.assert_array_equal(checkpoint.read_float32("x.weight", 2, 4), (weight.astype(np.float32) * column)[2:])


def test_fp8_without_scales_is_its_own_value_where_nothing_speaks_of_any(tmp_path: Path) -> None:
    every = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).reshape(2, 128)
    folder = save_fp8(tmp_path / "m", {"w": every})
    write_config(folder)
    checkpoint = Checkpoint.open(folder)
    assert not checkpoint.has_scales("w")
    np.testing.assert_array_equal(checkpoint.read_float32("w"), every.astype(np.float32))


@pytest.mark.parametrize("is_described", [True, False])
@pytest.mark.parametrize("scale", ["a.scale", "a.weight_scales", "a.weight.scale", "a.scale_weight", None])
def test_fp8_weights_need_a_scale_of_a_known_name(tmp_path: Path, scale: str | None, is_described: bool) -> None:
    tensors = {"a.weight": fp8(np.ones((2, 3))), "b.weight": fp8(np.ones((2, 3))), "b.weight_scale": np.float32([2])}
    folder = save_fp8(tmp_path / "m", tensors | ({scale: np.float32([2])} if scale else {}))
    if not is_described:
        write_config(folder)
    if scale is None and not is_described:
        assert "a.weight" in Checkpoint.open(folder).tensors  # a cast model, whose values are what they are
        return
    message = rf"'a\.weight' is F8_E4M3 and needs its scale in a\.weight_scale_inv.*{scale or 'found no scale'}"
    with pytest.raises(FormatError, match=message):
        Checkpoint.open(folder)


def test_one_scale_fits_any_number_of_axes(tmp_path: Path) -> None:
    weight = fp8(np.arange(12).reshape(2, 2, 3))
    checkpoint = Checkpoint.open(save_fp8(tmp_path / "m", {"w": weight, "w_scale": np.float32([3])}))
    np.testing.assert_array_equal(checkpoint.read_float32("w", 1), weight[1:].astype(np.float32) * 3)


def test_an_fp8_weight_without_rows_reads_as_empty(tmp_path: Path) -> None:
    folder = save_fp8(tmp_path / "m", {"w": fp8(np.zeros((0, 4))), "w_scale": np.float32([3])})
    assert Checkpoint.open(folder).read_float32("w").shape == (0, 4)


def test_a_scale_of_another_weight_type_stays_a_tensor(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(write_single(tmp_path / "m", {"w": A, "w_scale": A}))
    assert list(checkpoint.tensors) == ["w", "w_scale"]


def test_scales_of_many_axes_are_unsupported(tmp_path: Path) -> None:
    tensors = {"w": fp8(np.zeros((2, 2, 3))), "w_scale": np.ones((2, 1), np.float32)}
    with pytest.raises(UnsupportedError, match=r"tensor 'w' of shape \(2, 2, 3\) is fp8 with scales of shape \(2, 1\)"):
        Checkpoint.open(save_fp8(tmp_path / "m", tensors)).read_float32("w")


def test_scales_that_fit_nothing_are_refused(tmp_path: Path) -> None:
    tensors = {"w": fp8(np.zeros((5, 7))), "w_scale": np.ones((2, 3), np.float32)}
    with pytest.raises(FormatError, match=r"expected one scale, one per row, or \(1, 1\) for blocks of 128 x 128"):
        Checkpoint.open(save_fp8(tmp_path / "m", tensors)).read_float32("w")


@pytest.mark.parametrize("block", [[0, 128], [128], "128", [1.5, 2]])
def test_a_bad_block_size_is_refused(tmp_path: Path, block: Any) -> None:
    tensors = {"w": fp8(np.zeros((5, 7))), "w_scale_inv": np.ones((2, 3), np.float32)}
    quantization = {"quant_method": "fp8", "weight_block_size": block}
    with pytest.raises(FormatError, match="weight_block_size must be two positive integers"):
        Checkpoint.open(save_fp8(tmp_path / "m", tensors, quantization)).read_float32("w")


def test_two_scales_of_one_weight_are_refused(tmp_path: Path) -> None:
    scale = np.ones(1, np.float32)
    tensors = {"w": fp8(np.zeros((1, 1))), "w_scale": scale, "w_scale_inv": scale}
    with pytest.raises(FormatError, match="tensor 'w' has two scales"):
        Checkpoint.open(save_fp8(tmp_path / "m", tensors))


def test_a_scale_that_is_no_float_is_refused(tmp_path: Path) -> None:
    tensors = {"w": fp8(np.zeros((1, 1))), "w_scale": np.ones(1, np.int8)}
    with pytest.raises(FormatError, match="scale tensor 'w_scale' has dtype I8"):
        Checkpoint.open(save_fp8(tmp_path / "m", tensors))


def test_a_file_is_not_a_folder(tmp_path: Path) -> None:
    write_single(tmp_path, {"a": A})
    with pytest.raises(ValueError, match="is a file; a checkpoint is a folder"):
        Checkpoint.open(tmp_path / "model.safetensors")


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nothing is missing; a checkpoint is a folder"):
        Checkpoint.open(tmp_path / "nothing")


def test_a_folder_without_a_config_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match=r"has no config.json"):
        Checkpoint.open(tmp_path)


def test_a_bad_config_names_its_file(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(FormatError, match=r"config\.json: the configuration is not valid JSON"):
        Checkpoint.open(tmp_path)


def test_a_config_that_is_no_object_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(FormatError, match="the configuration must be a JSON object, found list"):
        Checkpoint.open(tmp_path)


@pytest.mark.parametrize("method", ["aqlm", "vptq"])
def test_other_quantized_checkpoints_are_unsupported(tmp_path: Path, method: str | None) -> None:
    write_single(tmp_path, {"a": A}, quantization_config={"quant_method": method})
    with pytest.raises(UnsupportedError, match=f"the weights are quantized by {method!r}"):
        Checkpoint.open(tmp_path)


@pytest.mark.parametrize(
    "quantization",
    [
        {"format": "pack-quantized"},
        {"config_groups": {"g": {"weights": {"type": "int", "num_bits": 4}}}},
        {"config_groups": {"g": None}},
    ],
)
def test_compressed_tensors_that_are_not_fp8_are_unsupported(tmp_path: Path, quantization: dict[str, Any]) -> None:
    write_single(tmp_path, {"a": A}, quantization_config={"quant_method": "compressed-tensors", **quantization})
    with pytest.raises(UnsupportedError, match="the weights are quantized by 'compressed-tensors'"):
        Checkpoint.open(tmp_path)


def test_a_compressed_model_is_no_checkpoint(tmp_path: Path) -> None:
    write_single(tmp_path, {"a": A}, quantization_config={"quant_method": "entrollm"})
    with pytest.raises(UnsupportedError, match="is compressed already"):
        Checkpoint.open(tmp_path)


def test_a_quantization_config_that_is_no_object_is_refused(tmp_path: Path) -> None:
    write_single(tmp_path, {"a": A}, quantization_config="gptq")
    with pytest.raises(FormatError, match="quantization_config must be an object, found str"):
        Checkpoint.open(tmp_path)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "consolidated.00.pth", "model.pt"])
def test_pickles_are_unsupported(tmp_path: Path, name: str) -> None:
    write_config(tmp_path)
    (tmp_path / name).write_bytes(b"")
    with pytest.raises(UnsupportedError, match=f"{name}.* convert them to safetensors"):
        Checkpoint.open(tmp_path)


def test_a_folder_without_weights_is_refused(tmp_path: Path) -> None:
    write_config(tmp_path)
    with pytest.raises(FormatError, match="has no weights"):
        Checkpoint.open(tmp_path)


def test_shards_without_their_index_are_refused(tmp_path: Path) -> None:
    (write_sharded(tmp_path, [{"a": A}, {"b": B}]) / "model.safetensors.index.json").unlink()
    with pytest.raises(
        FormatError, match=r"has neither model.safetensors nor .* only model-00001-of-00002.safetensors"
    ):
        Checkpoint.open(tmp_path)


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    (write_sharded(tmp_path, [{"a": A}, {"b": B}]) / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(FormatError, match=r"shard model-00002-of-00002.safetensors is missing"):
        Checkpoint.open(tmp_path)


def test_a_shard_that_the_index_does_not_name_is_refused(tmp_path: Path) -> None:
    write_sharded(tmp_path, [{"a": A}, {"b": B}], {"a": "model-00001-of-00002.safetensors"})
    with pytest.raises(FormatError, match=r"shard model-00002-of-00002.safetensors is not in model.safetensors.index"):
        Checkpoint.open(tmp_path)


def test_a_second_single_file_is_refused(tmp_path: Path) -> None:
    save_file({"a": A}, write_sharded(tmp_path, [{"a": A}]) / "model.safetensors")
    with pytest.raises(FormatError, match="an index that does not name it; remove the stale one"):
        Checkpoint.open(tmp_path)


def test_a_tensor_that_the_index_does_not_name_is_refused(tmp_path: Path) -> None:
    write_sharded(tmp_path, [{"a": A, "b": B}], {"a": "model-00001-of-00001.safetensors"})
    with pytest.raises(FormatError, match=r"tensor 'b' of model-00001-of-00001.safetensors is not in"):
        Checkpoint.open(tmp_path)


def test_a_tensor_that_no_shard_has_is_refused(tmp_path: Path) -> None:
    shard = "model-00001-of-00001.safetensors"
    write_sharded(tmp_path, [{"a": A}], {"a": shard, "b": shard})
    with pytest.raises(FormatError, match=r"the index places tensor 'b' in .*, but no shard has it"):
        Checkpoint.open(tmp_path)


def test_a_tensor_in_another_shard_than_the_index_says_is_refused(tmp_path: Path) -> None:
    first, second = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
    write_sharded(tmp_path, [{"a": A}, {"b": B}], {"a": second, "b": first})
    with pytest.raises(FormatError, match=f"the index places tensor 'a' in {second}, but it is in {first}"):
        Checkpoint.open(tmp_path)


def test_a_duplicate_tensor_is_refused(tmp_path: Path) -> None:
    first, second = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
    write_sharded(tmp_path, [{"a": A}, {"a": A, "b": B}], {"a": first, "b": second})
    with pytest.raises(FormatError, match=f"tensor 'a' is in two shards, {first} and {second}"):
        Checkpoint.open(tmp_path)


def test_a_truncated_shard_is_named(tmp_path: Path) -> None:
    shard = write_sharded(tmp_path, [{"a": A}, {"b": B}]) / "model-00002-of-00002.safetensors"
    os.truncate(shard, shard.stat().st_size - 1)
    with pytest.raises(FormatError, match=r"model-00002-of-00002.safetensors: tensor 'b' ends at .* truncated"):
        Checkpoint.open(tmp_path)


@pytest.mark.parametrize("weight_map", [None, [], {}])
def test_an_index_without_a_map_is_refused(tmp_path: Path, weight_map: Any) -> None:
    write_config(tmp_path)
    write_index(tmp_path, weight_map)
    with pytest.raises(FormatError, match="weight_map must be an object"):
        Checkpoint.open(tmp_path)


@pytest.mark.parametrize("shard", ["../x.safetensors", "/etc/x.safetensors", "a/b.safetensors", "model.bin", 3])
def test_an_index_cannot_lead_out_of_the_folder(tmp_path: Path, shard: Any) -> None:
    write_config(tmp_path)
    write_index(tmp_path, {"a": shard})
    with pytest.raises(FormatError, match=r"tensor 'a' is in .*, expected a \.safetensors file's name"):
        Checkpoint.open(tmp_path)
