"""Calibration: moments of the engine's own activations, texts that are refused, and a calibrated model."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from transformers import BertConfig, BertForMaskedLM

from entrollm import _core
from entrollm.calibrate import CalibrationText, calibrate, calibration_windows, held_out, sums
from entrollm.calibrate.store import StoredStatistics
from entrollm.calibrate.sums import Squares
from entrollm.calibrate.text import held_out_windows
from entrollm.checkpoint.model_folder import Checkpoint
from entrollm.compress import CodingOptions, Target, compress_folder
from entrollm.compress.verify import verify
from entrollm.engine.files import read_model_files
from entrollm.engine.linear import DenseLinear, DenseWeights
from entrollm.engine.model import Model
from entrollm.errors import EntroLLMError, FormatError, UnsupportedError
from entrollm.evaluate.divergence import token_divergences
from entrollm.format.reader import CompressedModel
from entrollm.matrix import matrix_of
from tests.support.paths import SENTENCES, TINY_LLAMA


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of two narrow layers with random weights and the example's tokenizer."""
    folder = tmp_path_factory.mktemp("model")
    config = json.loads((TINY_LLAMA / "config.json").read_text(encoding="utf-8"))
    config |= {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "head_dim": 16}
    config |= {"num_attention_heads": 4, "num_key_value_heads": 2, "torch_dtype": "float32"}
    generator = np.random.default_rng(11)
    shapes: dict[str, tuple[int, ...]] = {"embed_tokens": (8192, 64), "norm": (64,)}
    linear = {"self_attn.q_proj": (64, 64), "self_attn.k_proj": (32, 64), "self_attn.v_proj": (32, 64)}
    linear |= {"self_attn.o_proj": (64, 64), "mlp.gate_proj": (96, 64), "mlp.up_proj": (96, 64)}
    linear |= {"mlp.down_proj": (64, 96)}
    for layer in range(2):
        shapes |= {f"layers.{layer}.{name}": shape for name, shape in linear.items()}
        shapes |= {f"layers.{layer}.{name}": (64,) for name in ("input_layernorm", "post_attention_layernorm")}
    tensors = {
        f"model.{name}.weight": (generator.standard_normal(shape) * 0.1 + (len(shape) == 1)).astype(np.float32)
        for name, shape in shapes.items()
    }
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    shutil.copy(TINY_LLAMA / "tokenizer.json", folder)
    return folder


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(SENTENCES.read_text(encoding="utf-8")[:40_000], encoding="utf-8")
    return path


def test_windows_are_spread_over_the_text(text: Path) -> None:
    tokenizer = read_model_files(TINY_LLAMA).tokenizer
    assert tokenizer is not None
    ids = tokenizer.encode(text.read_text(encoding="utf-8"), add_special_tokens=False).ids
    windows = calibration_windows(tokenizer, text, 128, 3)
    assert windows.shape == (3, 128)
    assert windows[0].tolist() == ids[:128]
    last = len(ids) // 128 - 1
    assert windows[2].tolist() == ids[last * 128 : (last + 1) * 128]


def test_a_factor_holds_the_moments_of_the_normed_embeddings(model: Path, text: Path, tmp_path: Path) -> None:
    statistics = calibrate(model, CalibrationText(text, 2, sampled=0), tmp_path)
    files = read_model_files(model)
    assert files.tokenizer is not None
    ids = calibration_windows(files.tokenizer, text, 512, 2)
    with Checkpoint.open(model) as checkpoint:
        x = DenseWeights(checkpoint).embedding("model.embed_tokens.weight").rows(ids.reshape(-1)).astype(np.float64)
        norm = checkpoint.read_float32("model.layers.0.input_layernorm.weight")
    x = x / np.sqrt(np.square(x).mean(axis=1, keepdims=True) + 1e-5) * norm
    inputs = x.T @ x / np.square(x).sum()
    for name in ("q_proj", "k_proj", "v_proj"):
        factor = statistics.factor(f"model.layers.0.self_attn.{name}.weight")
        assert factor is not None
        moments = factor.astype(np.float64) @ factor.T
        # Half of it comes from the inputs and half from gradients, which only add; 2 % of damping.
        assert np.trace(moments) == pytest.approx(2 * 1.02, rel=1e-3)
        assert np.linalg.eigvalsh(moments - 0.95 * inputs).min() > -1e-5
    down = statistics.factor("model.layers.1.mlp.down_proj.weight")
    assert down is not None
    assert down.shape == (96, 96)
    assert statistics.factor("unknown") is None
    assert sorted(path.name.split("-")[0] for path in tmp_path.iterdir()) == ["factor"] * 15


@pytest.fixture(scope="module")
def statistics(model: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> StoredStatistics:
    return calibrate(model, CalibrationText(text, 12, sampled=0), tmp_path_factory.mktemp("statistics"))


class Noisy(DenseWeights):
    """A model with white noise on one matrix."""

    def __init__(self, checkpoint: Checkpoint, name: str, relative_error: float) -> None:
        super().__init__(checkpoint)
        weight = checkpoint.read_float32(name)
        noise = np.random.default_rng(1).standard_normal(weight.shape) * np.sqrt(np.square(weight).mean())
        self._matrices[name] = DenseLinear(weight + (relative_error * noise).astype(np.float32))


@pytest.mark.parametrize("name", ["layers.0.mlp.up_proj", "layers.1.mlp.down_proj", "embed_tokens"])
def test_the_share_of_a_matrix_predicts_the_divergence_that_noise_causes(
    name: str, model: Path, text: Path, statistics: StoredStatistics
) -> None:
    sensitivity = statistics.sensitivity(f"model.{name}.weight")
    assert sensitivity is not None
    files = read_model_files(model)
    assert files.tokenizer is not None
    windows = calibration_windows(files.tokenizer, text, 512, 3)
    with Checkpoint.open(model) as checkpoint:
        original = Model(files, DenseWeights(checkpoint))
        noisy = Model(files, Noisy(checkpoint, f"model.{name}.weight", 0.05))
        divergences = [token_divergences(original.logits(ids), noisy.logits(ids)).mean() for ids in windows]
    assert np.mean(divergences) == pytest.approx(sensitivity.share * 0.05**2, rel=0.35)


def test_a_calibrated_model_meets_its_size_and_verifies(model: Path, text: Path, tmp_path: Path) -> None:
    (tmp_path / "factors").mkdir()
    statistics = calibrate(model, CalibrationText(text, 4, sampled=0), tmp_path / "factors")
    options = CodingOptions(target=Target(bits_per_weight=4.0))
    result = compress_folder(model, tmp_path / "out", options, statistics=statistics)
    assert result.file_bits == pytest.approx(4.0, rel=0.005)
    with CompressedModel.open(tmp_path / "out") as compressed, Checkpoint.open(model) as original:
        assert verify(compressed, _core.ThreadPool(2), original).compared
        assert compressed.specs["model.layers.0.mlp.up_proj.weight"].grid_name.startswith("feedback-")
        assert compressed.specs["model.embed_tokens.weight"].grid_name.startswith("feedback-")


def test_a_short_text_is_refused(model: Path, tmp_path: Path) -> None:
    short = tmp_path / "short.txt"
    short.write_text("Once upon a time")
    with pytest.raises(FormatError, match="calibration needs at least 8 windows of 512"):
        calibrate(model, CalibrationText(short), tmp_path)


def test_a_tokenizer_of_another_model_is_named(model: Path, text: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(model, other)
    config = json.loads((other / "config.json").read_text(encoding="utf-8"))
    (other / "config.json").write_text(json.dumps(config | {"vocab_size": 100}), encoding="utf-8")
    with pytest.raises(FormatError, match=r"makes token \d+ of the text, and the model knows 100; the"):
        calibrate(other, CalibrationText(text, sampled=0), tmp_path)


def test_a_model_that_writes_no_text_needs_one(tmp_path: Path) -> None:
    BertForMaskedLM(
        BertConfig(vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    ).save_pretrained(tmp_path)
    with pytest.raises(UnsupportedError, match=r"BertForMaskedLM does not write text; calibrate on a text alone"):
        calibrate(tmp_path, CalibrationText(None), tmp_path)


def test_the_light_method_moves_steps_alone(model: Path, text: Path, tmp_path: Path) -> None:
    (tmp_path / "factors").mkdir()
    statistics = calibrate(model, CalibrationText(text, 8, sampled=0, tokens=64), tmp_path / "factors")
    assert statistics.windows.shape == (8, 64)
    options = CodingOptions(target=Target(bits_per_weight=4.0), method="light", threads=1)
    result = compress_folder(model, tmp_path / "out", options, statistics=statistics)
    assert result.file_bits == pytest.approx(4.0, rel=0.005)
    name = "model.layers.0.mlp.down_proj.weight"
    with CompressedModel.open(tmp_path / "out") as compressed, Checkpoint.open(model) as original:
        assert verify(compressed, _core.ThreadPool(2), original).compared
        assert compressed.specs[name].grid_name.startswith("ecsq-")
        steps = matrix_of(compressed, name).column_scale
    factor = statistics.factor(name)
    assert factor is not None
    assert steps is not None
    # The larger the inputs of a column, the smaller its step: in proportion to the root, to within half a code.
    product = steps * np.linalg.norm(factor, axis=1) ** 0.5
    np.testing.assert_allclose(product / product.mean(), 1, atol=0.1)


def test_a_text_that_is_not_utf8_is_refused(model: Path, tmp_path: Path) -> None:
    binary = tmp_path / "binary.txt"
    binary.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(FormatError, match=r"binary.txt is not UTF-8 text"):
        calibrate(model, CalibrationText(binary), tmp_path)


def test_calibration_for_a_width_is_refused(model: Path, text: Path, tmp_path: Path) -> None:
    (tmp_path / "factors").mkdir()
    statistics = calibrate(model, CalibrationText(text, 1, sampled=0), tmp_path / "factors")
    with pytest.raises(ValueError, match="calibration needs a size"):
        compress_folder(model, tmp_path / "out", CodingOptions(bits=4), statistics=statistics)


def broken_copy(model: Path, folder: Path, name: str, value: float) -> Path:
    """The model with one number of one tensor replaced."""
    shutil.copytree(model, folder)
    tensors = load_file(model / "model.safetensors")
    tensors[name].reshape(-1)[3] = value
    save_file(tensors, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_activations_that_are_not_finite_are_named(
    model: Path, text: Path, tmp_path: Path, value: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Finite weights may overflow; here the check of weights is left out."""
    monkeypatch.setattr("entrollm.engine.weights.check_finite", lambda name, values: None)
    broken = broken_copy(model, tmp_path / "broken", "model.layers.1.post_attention_layernorm.weight", value)
    with (
        np.errstate(invalid="ignore", over="ignore"),
        pytest.raises(EntroLLMError, match=r"layers.1.mlp.gate_proj.weight: its inputs on the calibration text are"),
    ):
        calibrate(broken, CalibrationText(text, 2, sampled=0), tmp_path)


def test_gradients_that_are_not_finite_are_named(model: Path, text: Path, tmp_path: Path) -> None:
    broken = broken_copy(model, tmp_path / "broken", "model.norm.weight", np.nan)
    with (
        np.errstate(invalid="ignore"),
        pytest.raises(
            EntroLLMError, match=r"layers.1.\S+.weight: its gradients on the calibration text are not finite"
        ),
    ):
        calibrate(broken, CalibrationText(text, 2, sampled=0), tmp_path)


def test_dead_inputs_have_a_defined_result(model: Path, text: Path, tmp_path: Path) -> None:
    dead = tmp_path / "dead"
    shutil.copytree(model, dead)
    tensors = load_file(model / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"][:] = 0
    tensors["model.layers.1.input_layernorm.weight"][7] = 0
    save_file(tensors, dead / "model.safetensors")
    (tmp_path / "factors").mkdir()
    statistics = calibrate(dead, CalibrationText(text, 4, sampled=0), tmp_path / "factors")
    inert = statistics.sensitivity("model.layers.0.mlp.down_proj.weight")
    assert inert is not None
    result = compress_folder(
        dead, tmp_path / "out", CodingOptions(target=Target(bits_per_weight=4.0)), statistics=statistics
    )
    assert result.file_bits == pytest.approx(4.0, rel=0.005)
    with CompressedModel.open(tmp_path / "out") as compressed:
        assert verify(compressed, _core.ThreadPool(2)).matrices


def test_windows_held_out_are_not_calibrated_on(model: Path, text: Path) -> None:
    tokenizer = read_model_files(TINY_LLAMA).tokenizer
    assert tokenizer is not None
    seen = calibration_windows(tokenizer, text, 128, 1000, held_out=5)
    kept = held_out_windows(tokenizer, text, 128, 5)
    everything = calibration_windows(tokenizer, text, 128, 1000)
    np.testing.assert_array_equal(np.concatenate([seen, kept]), everything)
    with pytest.raises(FormatError, match=r"calibration needs at least \d+ windows of 128"):
        held_out_windows(tokenizer, text, 128, len(everything))
    written = held_out(model, CalibrationText(None, held_out=1))
    assert written.shape == (1, 512)


@pytest.mark.parametrize("rows", [3, 300])
def test_squares_of_gradients_are_those_of_the_product_whatever_the_shape(
    rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = np.random.default_rng(8)
    x = generator.standard_normal((3, 20, 30)).astype(np.float32)
    gradient = generator.standard_normal((3, 20, rows)).astype(np.float32)
    monkeypatch.setattr(sums, "_GRADIENT_NUMBERS", 2 * 30 * rows)
    squares = Squares()
    squares.add_products(torch.from_numpy(x), torch.from_numpy(gradient))
    whole = (gradient.astype(np.float64).transpose(0, 2, 1) @ x).reshape(-1, 30)
    np.testing.assert_allclose(np.tril(squares.columns), np.tril(whole.T @ whole), rtol=1e-3, atol=1e-2)
    assert squares.total == pytest.approx(float(np.square(whole).sum()), rel=1e-4)
