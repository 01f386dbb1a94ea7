"""Asked sizes: parsing, feasibility, and files that meet them."""

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from entrollm import _core
from entrollm.checkpoint.model_folder import Checkpoint
from entrollm.cli.console import describe_error
from entrollm.compress import CodingOptions, Target, compress_folder, parse_size, plan
from entrollm.compress.describe import describe
from entrollm.compress.verify import verify
from entrollm.errors import EntroLLMError, FormatError
from entrollm.format.flat import FlatCode
from entrollm.format.reader import CompressedModel
from entrollm.quantize.importance import relative_steps, row_precision
from entrollm.quantize.select import BitsOverride
from entrollm.quantize.statistics import Sensitivity
from tests.support.checkpoints import write_random_llama
from tests.support.gguf_sources import write_gguf
from tests.support.paths import TINY_LLAMA


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two layers of Gaussian weights, of unlike sizes."""
    folder = tmp_path_factory.mktemp("source")
    generator = np.random.default_rng(5)
    shapes = {"model.embed_tokens": (300, 192), "model.norm": (192,)}
    for layer in range(2):
        prefix = f"model.layers.{layer}."
        shapes |= {prefix + "self_attn.v_proj": (64, 192), prefix + "mlp.down_proj": (192, 512)}
    tensors = {f"{name}.weight": generator.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    return folder


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("1TB", 10**12),
        ("2TiB", 2 << 40),
        ("1.9GB", 1_900_000_000),
        ("900 MB", 900_000_000),
        ("1.5GiB", 3 << 29),
        ("7", 7),
        (".5kb", 500),
        ("2 B", 2),
    ],
)
def test_sizes_are_parsed(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GB", "1.9 TBs", "-3MB", "1,9GB", "nan", "1e9", "9" * 5000])
def test_text_that_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is not a valid file size"):
        parse_size(text)


def test_a_size_beyond_all_files_is_refused() -> None:
    with pytest.raises(ValueError, match="is more than a file can hold"):
        parse_size("9" * 400 + "GB")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "either bits per weight or a file size"),
        ({"bits_per_weight": 3.0, "file_bytes": 5}, "either bits per weight or a file size"),
        ({"bits_per_weight": 0.0}, "above 0"),
        ({"bits_per_weight": float("nan")}, "above 0"),
        ({"file_bytes": 0}, "at least 1 byte"),
        ({"file_bytes": 2**63}, "below 2"),
    ],
)
def test_impossible_targets_are_refused(arguments: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Target(**arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize("bits", [2.0, 3.3, 5.0, 6.5])
def test_bits_per_weight_are_met(checkpoint: Path, tmp_path: Path, bits: float) -> None:
    result = compress_folder(checkpoint, tmp_path / "out", CodingOptions(target=Target(bits_per_weight=bits)))
    assert result.file_bits == pytest.approx(bits, rel=0.005)
    assert (tmp_path / "out" / "model.safetensors").stat().st_size == result.file_bytes


@pytest.mark.parametrize("bits", [4.8])
def test_bits_per_weight_are_met_with_flat_codes(checkpoint: Path, tmp_path: Path, bits: float) -> None:
    options = CodingOptions(target=Target(bits_per_weight=bits), prefer="speed")
    result = compress_folder(checkpoint, tmp_path / "out", options)
    assert result.file_bits == pytest.approx(bits, rel=0.005)
    assert plan(checkpoint, options).file_bits == pytest.approx(bits, rel=0.02)
    with CompressedModel.open(tmp_path / "out") as model:
        assert all(isinstance(spec.code, FlatCode) for spec in model.specs.values())
        verify(model, _core.ThreadPool(1), Checkpoint.open(checkpoint))
        codes = {tensor.code for tensor in describe(model, _core.ThreadPool(1)).tensors}
    assert all(code.startswith("flat ") for code in codes) and len(codes) > 1


@pytest.mark.parametrize("size", [90_000, 120_000, 200_000])
def test_a_file_size_is_not_exceeded(checkpoint: Path, tmp_path: Path, size: int) -> None:
    result = compress_folder(checkpoint, tmp_path / "out", CodingOptions(target=Target(file_bytes=size)))
    assert 0.995 * size <= result.file_bytes <= size


def test_a_limit_above_the_largest_size_gives_the_finest_steps(checkpoint: Path, tmp_path: Path) -> None:
    """A size is a limit, not a wish: 1 TB is no error, and loses nothing that less room would keep."""
    options = CodingOptions(target=Target(file_bytes=10**12))
    result = compress_folder(checkpoint, tmp_path / "out", options)
    smaller = compress_folder(checkpoint, tmp_path / "smaller", CodingOptions(target=Target(file_bytes=200_000)))
    with CompressedModel.open(tmp_path / "out") as model, CompressedModel.open(tmp_path / "smaller") as other:
        for name, spec in model.specs.items():
            assert spec.relative_error < other.specs[name].relative_error
    assert smaller.file_bytes < result.file_bytes < 10**12
    assert plan(checkpoint, options).file_bytes == pytest.approx(result.file_bytes, rel=0.01)


def test_a_plan_of_a_quantized_checkpoint_advises_what_helps_a_plan(tmp_path: Path) -> None:
    write_gguf(tmp_path / "model.gguf", "Q8_0")
    with pytest.raises(ValueError, match=r"quantized already \(GGUF\).*plan the checkpoint that it was made from$"):
        plan(tmp_path / "model.gguf", CodingOptions(target=Target(file_bytes=10**9)))


def test_a_plan_lists_layers_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    names = [f"model.layers.{layer}.mlp.up_proj.weight" for layer in (0, 1, 2, 9, 10, 11)]
    generator = np.random.default_rng(5)
    tensors = {name: generator.standard_normal((64, 64)).astype(np.float32) for name in names}
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    options = CodingOptions(target=Target(bits_per_weight=6.0))
    assert [tensor.name for tensor in plan(tmp_path, options).tensors] == names
    compress_folder(tmp_path, tmp_path / "out", options)
    with CompressedModel.open(tmp_path / "out") as model:
        assert [tensor.name for tensor in describe(model, _core.ThreadPool(1)).tensors] == names


def test_a_target_holds_over_several_shards_and_kept_tensors(checkpoint: Path, tmp_path: Path) -> None:
    options = CodingOptions(
        target=Target(bits_per_weight=6.0), overrides=(BitsOverride("*v_proj*", None),), shard_bytes=1 << 18
    )
    result = compress_folder(checkpoint, tmp_path / "out", options)
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 1
    assert result.file_bits == pytest.approx(6.0, rel=0.005)
    with CompressedModel.open(tmp_path / "out") as model, Checkpoint.open(checkpoint) as original:
        assert "model.layers.1.self_attn.v_proj.weight" in model.plain
        assert verify(model, _core.ThreadPool(2), original).compared


@pytest.mark.parametrize("target", [Target(bits_per_weight=0.5), Target(bits_per_weight=15.0), Target(file_bytes=9)])
def test_a_size_out_of_reach_is_refused_with_the_range(checkpoint: Path, tmp_path: Path, target: Target) -> None:
    with pytest.raises(ValueError, match=r"it can take \d+ to \d+ bytes \(\d\.\d+ to \d+\.\d+ bits\)"):
        compress_folder(checkpoint, tmp_path / "out", CodingOptions(target=target))
    assert not (tmp_path / "out").exists()


def test_the_plan_predicts_what_compress_writes(tmp_path: Path) -> None:
    options = CodingOptions(target=Target(bits_per_weight=3.0))
    predicted = plan(TINY_LLAMA, options)
    result = compress_folder(TINY_LLAMA, tmp_path / "out", options)
    assert predicted.file_bytes == pytest.approx(result.file_bytes, rel=0.005)
    with CompressedModel.open(tmp_path / "out") as model:
        for tensor in predicted.tensors:
            assert tensor.relative_error == pytest.approx(model.specs[tensor.name].relative_error, rel=0.15)
    assert predicted.tokens_per_s > 0


def test_a_plan_for_a_width_is_refused(checkpoint: Path) -> None:
    with pytest.raises(ValueError, match="a plan needs a size"):
        plan(checkpoint, CodingOptions(bits=4))


def test_the_default_size_is_4_5_bits_of_the_coded_matrices(checkpoint: Path, tmp_path: Path) -> None:
    """Whatever is kept: half of the weights here, in float32."""
    keep = (BitsOverride("model.embed_tokens*", None),)
    for options in (CodingOptions(), CodingOptions(overrides=keep)):
        planned = plan(checkpoint, options)
        result = compress_folder(checkpoint, tmp_path / str(len(options.overrides)), options)
        assert planned.file_bytes == pytest.approx(result.file_bytes, rel=0.005)
        assert result.coded_bits == pytest.approx(4.5, rel=0.015)
        assert 0.04 < planned.relative_error < 0.07
        assert planned.relative_error == pytest.approx(result.relative_error, rel=0.1)
        assert result.worst is not None and result.worst.relative_error < 0.1
    config = json.loads((tmp_path / "0" / "config.json").read_text())
    assert config["quantization_config"] | {"version": 0} == {
        "quant_method": "entrollm",
        "version": 0,
        "method": "ecsq",
        "bits_per_weight": 4.5,
        "prefer": "size",
    }


def test_the_default_size_suits_a_model_that_cannot_take_it(tmp_path: Path) -> None:
    """Headers alone take more than 4.5 bits of these weights; the grid stays fine, and nothing is refused."""
    weights = {f"{i}.weight": np.random.default_rng(i).standard_normal((4, 8)).astype(np.float32) for i in range(3)}
    save_file(weights | {"norm": np.ones(3, np.float32)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    result = compress_folder(tmp_path, tmp_path / "out")
    assert result.coded_bits > 20 and result.relative_error < 0.15
    with pytest.raises(ValueError, match="this model cannot take"):
        compress_folder(tmp_path, tmp_path / "exact", CodingOptions(target=Target(bits_per_weight=4.5)))


def test_a_model_without_matrices_has_no_plan(tmp_path: Path) -> None:
    save_file({"norm": np.ones(3, np.float32)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    assert compress_folder(tmp_path, tmp_path / "out").worst is None
    with pytest.raises(ValueError, match="has no matrix to quantize"):
        plan(tmp_path, CodingOptions())


def test_a_weight_at_the_end_of_float32_is_named(checkpoint: Path, tmp_path: Path) -> None:
    """Reading would refuse the file: the place of 0 among the symbols times the scale overflows."""
    tensors = load_file(checkpoint / "model.safetensors")
    tensors["model.layers.0.self_attn.v_proj.weight"][3, 5] = 3e38
    source = tmp_path / "source"
    source.mkdir()
    save_file(tensors, source / "model.safetensors")
    (source / "config.json").write_text((checkpoint / "config.json").read_text())
    with pytest.raises(FormatError, match=r"layers\.0\.self_attn\.v_proj.*too near the end of float32") as raised:
        compress_folder(source, tmp_path / "out", CodingOptions(target=Target(bits_per_weight=2.0)))
    name = "model.layers.0.self_attn.v_proj.weight"
    assert str(raised.value).endswith(
        f"range for bpw and size; leave it at its type with keep=['{name}'], or use bits=8"
    )
    assert describe_error(raised.value).endswith(
        f"range for --bpw and --fit; leave it at its type with --keep {name}, or use --bits 8"
    )
    assert not (tmp_path / "out").exists()


def test_values_get_finer_steps_than_queries_and_few_weights_finer_than_many() -> None:
    prefix = "model.layers.3."
    names = {"self_attn.q_proj": (512, 512), "self_attn.v_proj": (128, 512), "mlp.up_proj": (2048, 512)}
    steps = relative_steps({f"{prefix}{name}.weight": shape for name, shape in names.items()})
    assert steps[prefix + "self_attn.v_proj.weight"] < steps[prefix + "mlp.up_proj.weight"]
    assert steps[prefix + "mlp.up_proj.weight"] < steps[prefix + "self_attn.q_proj.weight"]


def test_unknown_roles_get_the_mean_step() -> None:
    assert relative_steps({"a.weight": (8, 8), "b.weight": (64, 64)}) == {"a.weight": 1.0, "b.weight": 1.0}


def test_rows_of_frequent_tokens_are_more_precise() -> None:
    precision = row_precision("model.embed_tokens.weight", 4096)
    assert precision is not None
    assert (np.diff(precision) <= 0).all()
    assert np.log(precision).mean() == pytest.approx(0, abs=1e-4)
    assert row_precision("model.layers.0.mlp.up_proj.weight", 4096) is None


def test_measured_shares_replace_those_of_roles() -> None:
    shapes = {f"model.layers.1.self_attn.{name}.weight": (64, 64) for name in ("q_proj", "k_proj", "v_proj")}
    names = list(shapes)
    shares = {names[0]: Sensitivity(4.0), names[1]: Sensitivity(1.0), names[2]: Sensitivity(0.0)}
    steps = relative_steps(shapes, shares)
    assert steps[names[1]] / steps[names[0]] == pytest.approx(4**0.4)
    # A matrix without measured effect is no special one.
    assert steps[names[2]] == pytest.approx(1.0)


def test_rows_follow_measured_weights() -> None:
    weights = np.array([16.0, 1.0, 1.0, 1.0], np.float32)
    precision = row_precision("any.weight", 4, Sensitivity(1.0, weights))
    assert precision is not None
    np.testing.assert_allclose(precision / precision[1], [2, 1, 1, 1], rtol=1e-5)
    assert row_precision("model.embed_tokens.weight", 4096, Sensitivity(1.0)) is None


def test_many_tiny_shards(tmp_path: Path) -> None:
    """Files are padded to 64 bytes, which counts in files of 3 kB."""
    model = tmp_path / "model"
    model.mkdir()
    write_random_llama(model, layers=1, tied=True)

    def options(bits: float) -> CodingOptions:
        return CodingOptions(target=Target(bits_per_weight=bits), shard_bytes=8000)

    compress_folder(model, tmp_path / "out", options(3.238))
    files = list((tmp_path / "out").glob("*.safetensors"))
    assert len(files) == 11
    weights = sum(array.size for array in load_file(model / "model.safetensors").values())
    aim = 3.238 * weights / 8
    assert abs(sum(file.stat().st_size for file in files) - aim) <= 0.005 * aim + 64 * len(files)
    with pytest.raises(EntroLLMError, match=r"would take \d+ bytes, over the limit of \d+; give a larger size"):
        compress_folder(model, tmp_path / "small", options(2.2))
