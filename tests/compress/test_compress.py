"""A checkpoint becomes a compressed folder: the right integers, the same bytes however it is run."""

from __future__ import annotations

import json
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from entrollm import _core
from entrollm.checkpoint.model_folder import Checkpoint
from entrollm.codec.huffman import entropy_bits, huffman_bits
from entrollm.compress import CodingOptions, compress_folder
from entrollm.compress.progress import CompressProgress
from entrollm.compress.verify import verify
from entrollm.errors import FormatError, UnsupportedError
from entrollm.format.reader import CompressedModel
from entrollm.matrix import matrix_of
from entrollm.quantize import BitsOverride
from entrollm.quantize.paper import Granularity, make_grid, measure_range, quantize_rows
from tests.support.checkpoints import example_weights, write_checkpoint

MATRICES = [name for name, array in example_weights().items() if array.ndim == 2 and array.size]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("checkpoint") / "model")


def files(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in path.iterdir()}


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("granularity", ["tensor", "row"])
def test_the_integers_are_those_of_the_grid(
    checkpoint: Path, tmp_path: Path, bits: int, granularity: Granularity
) -> None:
    compress_folder(checkpoint, tmp_path / "out", CodingOptions(bits=bits, granularity=granularity))
    pool = _core.ThreadPool(2)
    weights = example_weights()
    with CompressedModel.open(tmp_path / "out") as model:
        assert set(model.specs) == set(MATRICES)
        assert set(model.plain) == set(weights) - set(MATRICES)
        for name in MATRICES:
            array = weights[name]
            grid = make_grid(measure_range([array], name), bits, granularity)
            symbols = quantize_rows(array, grid)
            matrix = matrix_of(model, name)
            spec = matrix.spec
            np.testing.assert_array_equal(matrix.symbols(0, len(array), pool), symbols, err_msg=name)
            rows = np.arange(len(array), dtype=np.int64)
            expected = grid.dequantize(symbols)
            np.testing.assert_array_equal(matrix.dequantize(rows, pool), expected, err_msg=name)
            error = np.linalg.norm(expected - array.astype(np.float64))
            norm = np.linalg.norm(array.astype(np.float64))
            assert spec.relative_error == pytest.approx(error / norm if norm else 0, rel=1e-4, abs=1e-9)
            assert spec.grid_name == f"paper-{grid.scheme}-{bits}-{granularity}"
        for name in model.plain:
            assert model.array(name).tobytes() == weights[name].tobytes()
            assert model.array(name).shape == weights[name].shape
        verify(model, pool, Checkpoint.open(checkpoint))


def test_the_folder_holds_what_a_model_needs(checkpoint: Path, tmp_path: Path) -> None:
    result = compress_folder(checkpoint, tmp_path / "out", CodingOptions(bits=8, prefer="speed"))
    expected = {"README.md", "config.json", "model.safetensors", "tokenizer.json", "entrollm_checksums.json"}
    assert set(files(tmp_path / "out")) == expected
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["hidden_size"] == 96
    assert config["quantization_config"] == {
        "quant_method": "entrollm",
        "version": 2,
        "bits": 8,
        "granularity": "tensor",
        "prefer": "speed",
        "method": "paper",
    }
    assert list(tmp_path.iterdir()) == [tmp_path / "out"]
    assert result.path == tmp_path / "out"


def test_the_result_adds_up(checkpoint: Path, tmp_path: Path) -> None:
    result = compress_folder(checkpoint, tmp_path / "out")
    weights = example_weights()
    assert result.weights == sum(array.size for array in weights.values())
    assert result.quantized_weights == sum(weights[name].size for name in MATRICES)
    assert result.file_bytes == (tmp_path / "out" / "model.safetensors").stat().st_size
    assert result.source_bytes == sum(f.stat().st_size for f in checkpoint.glob("*.safetensors"))
    assert result.file_bits == result.file_bytes * 8 / result.weights
    kept = sum(array.nbytes for name, array in weights.items() if name not in MATRICES)
    assert result.coded_bits == (result.file_bytes - kept) * 8 / result.quantized_weights
    assert result.resumed_weights == 0 and result.elapsed_s > 0
    entropy = huffman = 0.0
    with CompressedModel.open(tmp_path / "out") as model:
        for name, spec in model.specs.items():
            counts = _core.histogram(matrix_of(model, name).symbols(0, spec.rows, _core.ThreadPool(1))).tolist()
            entropy += entropy_bits(counts) * spec.rows * spec.columns
            huffman += huffman_bits(counts) * spec.rows * spec.columns
    assert result.entropy_bits == pytest.approx(entropy / result.quantized_weights)
    assert result.huffman_bits == pytest.approx(huffman / result.quantized_weights)
    assert json.dumps(result.to_json())


def test_threads_do_not_change_a_byte(checkpoint: Path, tmp_path: Path) -> None:
    for threads in (1, 3):
        compress_folder(checkpoint, tmp_path / str(threads), CodingOptions(threads=threads))
    assert files(tmp_path / "1") == files(tmp_path / "3")


def test_shards_hold_the_same_tensors(checkpoint: Path, tmp_path: Path) -> None:
    compress_folder(checkpoint, tmp_path / "one", CodingOptions(bits=4))
    compress_folder(checkpoint, tmp_path / "many", CodingOptions(bits=4, shard_bytes=60_000))
    shards = sorted((tmp_path / "many").glob("*.safetensors"))
    assert len(shards) > 3 and shards[0].name == f"model-00001-of-{len(shards):05d}.safetensors"
    index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(shard.stat().st_size for shard in shards)
    with CompressedModel.open(tmp_path / "one") as one, CompressedModel.open(tmp_path / "many") as many:
        assert dict(one.specs) == dict(many.specs)
        assert set(one.plain) == set(many.plain)
        for name in one.specs:
            expected, found = one.entries(name), many.entries(name)
            assert {s: a.tobytes() for s, a in expected.items()} == {s: a.tobytes() for s, a in found.items()}


def test_progress_reaches_the_whole(checkpoint: Path, tmp_path: Path) -> None:
    seen: list[CompressProgress] = []
    result = compress_folder(checkpoint, tmp_path / "out", on_progress=seen.append)
    assert {p.weights for p in seen} == {result.quantized_weights}
    assert max(p.weights_done for p in seen) == result.quantized_weights
    assert {p.tensor for p in seen} == set(MATRICES)


def test_the_output_appears_only_when_complete(checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    present = []
    compress_folder(checkpoint, out, on_progress=lambda _: present.append(out.exists()))
    assert not any(present) and out.exists()


def test_overrides_change_the_plan(checkpoint: Path, tmp_path: Path) -> None:
    overrides = (BitsOverride("layers.0.*", 8), BitsOverride("head*", None))
    compress_folder(checkpoint, tmp_path / "out", CodingOptions(overrides=overrides))
    with CompressedModel.open(tmp_path / "out") as model:
        assert "head.weight" in model.plain
        grids = {name: spec.grid_name for name, spec in model.specs.items()}
        assert grids["layers.0.up.weight"] == "paper-asymmetric-8-tensor"
        assert grids["embed.weight"] == "paper-asymmetric-4-tensor"


def test_fp8_weights_become_bf16_where_they_are_kept(tmp_path: Path) -> None:
    generator = np.random.default_rng(3)
    path = tmp_path / "fp8"
    path.mkdir()
    raw = generator.standard_normal((4, 64)).astype(ml_dtypes.float8_e4m3fn)
    scale = np.array(0.5, np.float32)
    save_file(
        {"a.weight": raw, "a.weight_scale": scale, "b.weight": raw, "b.weight_scale": scale},
        path / "model.safetensors",
    )
    config = {"quantization_config": {"quant_method": "fp8"}}
    (path / "config.json").write_text(json.dumps(config))
    compress_folder(path, tmp_path / "out", CodingOptions(bits=8, overrides=(BitsOverride("b.*", None),)))
    with CompressedModel.open(tmp_path / "out") as model:
        assert model.specs["a.weight"].dtype == "BF16" and model.plain == ("b.weight",)
        kept = model.array("b.weight").astype(np.float32)
        np.testing.assert_array_equal(kept, raw.astype(np.float32) * 0.5)


@pytest.mark.parametrize("options", [CodingOptions(), CodingOptions(bits=4)], ids=["free", "paper"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_weights_that_are_not_finite_are_refused(tmp_path: Path, value: float, options: CodingOptions) -> None:
    weights = example_weights()
    weights["head.weight"][7, 5] = value
    path = write_checkpoint(tmp_path / "model", weights)
    with pytest.raises(FormatError, match=r"tensor 'head\.weight' has .* at \[7, 5\]; weights must be finite"):
        compress_folder(path, tmp_path / "out", options)
    assert not (tmp_path / "out").exists()


def test_a_compressed_model_is_not_compressed_again(checkpoint: Path, tmp_path: Path) -> None:
    compress_folder(checkpoint, tmp_path / "out")
    with pytest.raises(UnsupportedError, match="is compressed already; `entrollm export` writes a checkpoint of it"):
        compress_folder(tmp_path / "out", tmp_path / "again")


def test_a_checkpoint_without_tensors_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model"
    path.mkdir()
    (path / "config.json").write_text("{}")
    save_file({}, path / "model.safetensors")
    with pytest.raises(FormatError, match="has no tensors"):
        compress_folder(path, tmp_path / "out")


def test_tensor_names_that_clash_with_entries_are_refused(tmp_path: Path) -> None:
    matrix = np.eye(4, dtype=np.float32)
    path = write_checkpoint(tmp_path / "model", {"a.weight": matrix, "a.weight.scale": matrix[0]})
    with pytest.raises(ValueError, match=r"two entries are called 'a\.weight\.scale'"):
        compress_folder(path, tmp_path / "out")
