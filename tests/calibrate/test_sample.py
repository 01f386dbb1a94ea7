"""Text that a model writes itself."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from entrollm.calibrate import CalibrationText, sample, sample_windows
from entrollm.checkpoint.model_folder import Checkpoint
from entrollm.cli.console import describe_error
from entrollm.engine.load import load
from entrollm.errors import EntroLLMError
from tests.support.paths import TINY_LLAMA


def test_a_trained_model_writes_what_it_finds_likely() -> None:
    with Checkpoint.open(TINY_LLAMA) as checkpoint:
        windows = sample_windows(checkpoint, (6, 40))
    assert windows.shape == (6, 40)
    assert len(np.unique(windows, axis=0)) == 6
    model = load(TINY_LLAMA, threads=1)
    losses = []
    for ids in windows:
        logits = model.logits(ids)
        logits -= np.log(np.exp(logits).sum(axis=1, keepdims=True))
        losses.append(-logits[np.arange(39), ids[1:]].mean())
    # Random tokens would cost ln 8192 = 9 nats or more.
    assert np.mean(losses) < 4.5


def test_equal_seeds_write_equal_text() -> None:
    with Checkpoint.open(TINY_LLAMA) as checkpoint:
        first, again, other = (sample_windows(checkpoint, (2, 8), seed) for seed in (1, 1, 2))
    assert (first == again).all()
    assert (first != other).any()


def test_caches_with_room_change_no_text(monkeypatch: pytest.MonkeyPatch) -> None:
    with Checkpoint.open(TINY_LLAMA) as checkpoint:
        written = sample_windows(checkpoint, (3, 20))
        given = []
        monkeypatch.setattr(sample, "_give_room", lambda cache, tokens: given.append(tokens))
        assert (written == sample_windows(checkpoint, (3, 20))).all()
    assert given == [20]


def test_a_model_whose_logits_are_not_finite_is_refused(tmp_path: Path) -> None:
    tensors = {}
    for file in TINY_LLAMA.glob("*.safetensors"):
        tensors |= load_file(file)
    tensors["model.norm.weight"] = np.full_like(tensors["model.norm.weight"], np.nan)
    save_file(tensors, tmp_path / "model.safetensors")
    shutil.copy(TINY_LLAMA / "config.json", tmp_path)
    with (
        Checkpoint.open(tmp_path) as checkpoint,
        pytest.raises(EntroLLMError, match=r"logits are not finite; its weights may be damaged"),
    ):
        sample_windows(checkpoint, (1, 2))


def test_a_model_larger_than_the_memory_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sysconf", lambda name: 1000)
    with (
        Checkpoint.open(TINY_LLAMA) as checkpoint,
        pytest.raises(
            EntroLLMError, match=r"needs 1.1 GB of memory, and this machine has 0.0 GB; .* sampled=0"
        ) as raised,
    ):
        sample_windows(checkpoint, (1, 2))
    assert describe_error(raised.value).endswith("has 0.0 GB; calibrate on a text alone, with --sampled 0")


def test_nothing_to_calibrate_on_is_refused() -> None:
    with pytest.raises(ValueError, match="needs a text or at least 8 sampled windows, found 3"):
        CalibrationText(None, sampled=3)
