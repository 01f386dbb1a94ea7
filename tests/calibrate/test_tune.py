"""Tuning: gradients of scales, what it changes in a folder and what it does not, and what it refuses."""

import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from transformers import BertConfig, BertModel
from typer.testing import CliRunner

from entrollm import _core
from entrollm.calibrate import StoredStatistics, Tuner, check_predicts, measure, tune
from entrollm.calibrate.scales import MovingScales
from entrollm.calibrate.store import Spool
from entrollm.calibrate.student import Student
from entrollm.checkpoint.model_folder import Checkpoint
from entrollm.cli.console import describe_error
from entrollm.cli.main import app
from entrollm.compress import CodingOptions, Target, compress_folder, pipeline
from entrollm.compress.verify import verify
from entrollm.engine.load import load
from entrollm.errors import EntroLLMError, UnsupportedError
from entrollm.evaluate import Windows, evaluate
from entrollm.format.reader import CompressedModel
from entrollm.matrix import matrix_of
from entrollm.torch.device import TorchDevice
from tests.calibrate.test_walk import AS_A_WHOLE, VOCABULARY, save_model
from tests.support.checkpoints import write_random_llama

OPTIONS = CodingOptions(target=Target(bits_per_weight=3.0), fine_scales=True, shard_bytes=150_000)


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "head"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two random layers."""
    return write_random_llama(tmp_path_factory.mktemp("model"), layers=2, tied=request.param)


def windows(count: int, seed: int) -> NDArray[np.int64]:
    return np.random.default_rng(seed).integers(0, 512, (count, 48))


@pytest.fixture(scope="module")
def statistics(model: Path, tmp_path_factory: pytest.TempPathFactory) -> StoredStatistics:
    with Checkpoint.open(model) as checkpoint:
        return measure(checkpoint, windows(24, 1), tmp_path_factory.mktemp("statistics"))


@pytest.fixture(scope="module")
def untuned(model: Path, statistics: StoredStatistics, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compress_folder(model, tmp_path_factory.mktemp("compressed") / "out", OPTIONS, statistics=statistics).path


def test_gradients_are_the_slopes_of_the_divergence(model: Path, untuned: Path, tmp_path: Path) -> None:
    generator = np.random.default_rng(5)
    read = windows(3, 2)
    with Checkpoint.open(model) as checkpoint, CompressedModel.open(untuned) as opened:
        check_gradients(checkpoint, opened, read, tmp_path, generator)


def check_gradients(
    checkpoint: Checkpoint,
    opened: CompressedModel,
    read: NDArray[np.int64],
    folder: Path,
    generator: np.random.Generator,
) -> None:
    device = TorchDevice("cpu")
    scales = MovingScales(opened, 1)
    student = Student(checkpoint, scales, Spool(folder, device), device)
    gradients = {entry: np.zeros_like(scale) for entry, scale in scales.values.items()}
    student.divergence(read, gradients)
    assert len(gradients) == 2 * len(opened.specs)
    for entry, gradient in gradients.items():
        scale = scales.values[entry]
        direction = (generator.standard_normal(scale.shape) + np.sign(gradient)).astype(np.float32)
        found = []
        for change in (0.003, -0.003):
            scales.values[entry] = scale * np.exp(np.float32(change) * direction)
            found.append(student.divergence(read))
        scales.values[entry] = scale
        slope = (found[0] - found[1]) / 0.006
        assert float(gradient @ direction) == pytest.approx(slope, rel=0.02, abs=1e-4), entry


@pytest.mark.parametrize("architecture", ["gpt2", "gemma2", "qwen3_moe", *AS_A_WHOLE])
def test_any_architecture_is_tuned(architecture: str, tmp_path: Path) -> None:
    source = save_model(architecture, tmp_path)
    read = np.random.default_rng(3).integers(0, VOCABULARY, (4, 24))
    options = CodingOptions(target=Target(coded_bits=3.0), fine_scales=True)
    out = compress_folder(source, tmp_path / "out", options).path
    with Checkpoint.open(source) as checkpoint, CompressedModel.open(out) as opened:
        device = TorchDevice("cpu")
        scales = MovingScales(opened, 1)
        student = Student(checkpoint, scales, Spool(tmp_path, device), device)
        gradients = {entry: np.zeros_like(scale) for entry, scale in scales.values.items()}
        before = student.divergence(read, gradients)
        square = 0.0
        for entry, gradient in gradients.items():
            scales.values[entry] *= np.exp(-2e-3 * gradient / before)
            square += 2e-3 * float(np.square(gradient).sum()) / before
        assert np.mean([np.any(gradient) for gradient in gradients.values()]) > 0.9
        assert before - student.divergence(read) == pytest.approx(square, rel=0.1)


def integers(folder: Path) -> dict[str, bytes]:
    """The symbols of all matrices, and the bytes of the other tensors."""
    pool = _core.ThreadPool(1)
    with CompressedModel.open(folder) as opened:
        symbols = {name: matrix_of(opened, name).symbols(0, spec.rows, pool) for name, spec in opened.specs.items()}
        kept = {name: opened.array(name) for name in opened.plain}
        return {name: array.tobytes() for name, array in (symbols | kept).items()}


def shards(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.glob("*.safetensors")}


def test_tuning_lowers_the_divergence_and_changes_scales_alone(
    model: Path, statistics: StoredStatistics, untuned: Path, tmp_path: Path
) -> None:
    tuner = Tuner(model, windows(80, 1), windows(8, 3))
    steps: list[tuple[float, float]] = []
    result = compress_folder(
        model,
        tmp_path / "out",
        OPTIONS,
        statistics=statistics,
        post_fit=lambda folder: tuner(folder, lambda done, total: steps.append((done, total))),
    )
    tuned = tuner.result
    assert tuned is not None and tuned.is_kept and result.is_refitted
    assert tuned.kl_after < 0.98 * tuned.kl_before
    assert tuned.predictions == 8 * 47
    assert steps == [(done, 80) for done in range(4, 81, 4)]
    evaluations, _ = evaluate(
        [load(folder) for folder in (untuned, result.path)], Windows(windows(8, 3), 1, 1), load(model)
    )
    measured = [evaluation.divergence.mean for evaluation in evaluations if evaluation.divergence is not None]
    assert measured == pytest.approx([tuned.kl_before, tuned.kl_after], rel=1e-3)
    assert integers(result.path) == integers(untuned)
    sizes = [sum(file.stat().st_size for file in folder.glob("*.safetensors")) for folder in (untuned, result.path)]
    assert sizes[1] == pytest.approx(sizes[0], rel=0.01)
    assert result.file_bytes == sizes[1]
    index = json.loads((result.path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sizes[1]
    assert {file.suffix for file in result.path.iterdir()} == {".json", ".safetensors"}
    with CompressedModel.open(result.path) as opened, Checkpoint.open(model) as checkpoint:
        verify(opened, _core.ThreadPool(1), checkpoint)


def test_tuning_that_does_not_help_changes_nothing(
    model: Path, statistics: StoredStatistics, untuned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tune, "_RATE", -0.05)  # uphill
    tuner = Tuner(model, windows(8, 1), windows(4, 3))
    out = compress_folder(model, tmp_path / "out", OPTIONS, statistics=statistics, post_fit=tuner).path
    assert tuner.result is not None and not tuner.result.is_kept
    assert tuner.result.to_json()["is_kept"] is False
    assert shards(out) == shards(untuned)


@pytest.mark.parametrize("model", [True], indirect=True)
def test_a_size_limit_holds_for_the_tuned_files(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tuner = Tuner(model, windows(40, 1), windows(4, 3))
    options = CodingOptions(target=Target(file_bytes=50_000), fine_scales=True)
    result = compress_folder(model, tmp_path / "out", options, post_fit=tuner)
    assert 49_500 < result.file_bytes <= 50_000
    assert result.is_refitted

    def noisy(folder: Path) -> dict[str, NDArray[Any]]:
        tuned = tuner(folder)
        random = np.random.default_rng(5)
        noise = {name: random.integers(0, 256, array.nbytes, np.uint8) for name, array in tuned.items()}
        return {name: noise[name].view(array.dtype).reshape(array.shape) for name, array in tuned.items()}

    # Scales that take too much are left out.
    monkeypatch.setattr(pipeline, "_ROOM", 0.0)
    options = CodingOptions(target=Target(file_bytes=50_000))
    result = compress_folder(model, tmp_path / "grown", options, post_fit=noisy)
    assert not result.is_refitted and result.file_bytes <= 50_000
    assert shards(result.path) == shards(compress_folder(model, tmp_path / "untuned", options).path)

    monkeypatch.setattr(pipeline, "_ROOM", -0.05)
    options = CodingOptions(target=Target(file_bytes=50_000), fine_scales=True)
    with pytest.raises(
        EntroLLMError, match=r"the tuned files would take \d+ bytes, over the limit of 50000; leave out tune"
    ) as raised:
        compress_folder(model, tmp_path / "exceeding", options, post_fit=tuner)
    assert describe_error(raised.value).endswith("over the limit of 50000; leave out --tune")
    assert not (tmp_path / "exceeding").exists()


def test_an_interrupted_tuning_leaves_no_output_and_is_resumed(
    model: Path, statistics: StoredStatistics, untuned: Path, tmp_path: Path
) -> None:
    def interrupt(folder: Path) -> dict[str, NDArray[np.float32]]:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compress_folder(model, tmp_path / "out", OPTIONS, statistics=statistics, post_fit=interrupt)
    assert [path.name for path in tmp_path.iterdir()] == ["out.partial"]
    result = compress_folder(model, tmp_path / "out", OPTIONS, statistics=statistics, post_fit=lambda folder: {})
    assert result.resumed_weights == result.quantized_weights
    assert shards(result.path) == shards(untuned)


@pytest.mark.parametrize("model", [True], indirect=True)
def test_the_command_says_what_tuning_did(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ["--bpw", "3.0", "--calibration", "self", "--sampled", "16", "--tune", "--threads", "1"]
    shown = CliRunner().invoke(app, ["compress", str(model), "-o", str(tmp_path / "out"), *arguments])
    assert shown.exit_code == 0, shown.output
    assert re.search(
        r"tuned: KL divergence [\d.]+ -> [\d.]+ nats, on 1,008 predictions that neither",
        " ".join(shown.stdout.split()),
    )
    monkeypatch.setattr(pipeline, "_has_room_for", lambda *_: False)
    shown = CliRunner().invoke(app, ["compress", str(model), "-o", str(tmp_path / "large"), *arguments])
    assert "tuned scales would take more than the requested size: they stay as they" in " ".join(shown.stdout.split())
    found = CliRunner().invoke(app, ["compress", str(model), "-o", str(tmp_path / "json"), *arguments, "--json"])
    tuning = json.loads(found.stdout)["tuning"]
    assert tuning["kl_after"] < tuning["kl_before"] and not tuning["is_kept"]


def test_tuning_of_a_grid_without_a_size_is_refused(model: Path, tmp_path: Path) -> None:
    tuner = Tuner(model, windows(8, 1), windows(4, 3))
    with pytest.raises(ValueError, match="tuning needs a size to compress to"):
        compress_folder(model, tmp_path / "out", CodingOptions(bits=4), post_fit=tuner)


def test_a_divergence_that_is_not_finite_is_an_error(
    model: Path, untuned: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("entrollm.calibrate.student._divergences", lambda wanted, _: wanted.sum(-1) * math.nan)
    with pytest.raises(EntroLLMError, match="the divergence of the compressed model is not finite"):
        Tuner(model, windows(8, 1), windows(4, 3))(untuned)


def test_a_model_that_predicts_no_tokens_is_refused(tmp_path: Path) -> None:
    config = BertConfig(vocab_size=64, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64)
    BertModel(config).save_pretrained(tmp_path)
    with pytest.raises(UnsupportedError, match="BertModel predicts no tokens, which tuning needs"):
        check_predicts(tmp_path, "tuning")
