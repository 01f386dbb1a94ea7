"""Divergences computed in torch: those of the engine, and what a search with a GPU measures."""

from pathlib import Path

import numpy as np
import pytest

from entrollm.calibrate import compare
from entrollm.compress import CodingOptions, Target, compress_folder
from entrollm.engine.load import load
from entrollm.evaluate import Windows, evaluate
from entrollm.evaluate.divergence import summarize_divergences
from entrollm.recipes import CompressOptions, calibrated, compress, search
from entrollm.torch.device import TorchDevice
from tests.support.checkpoints import write_random_llama

WINDOWS = np.random.default_rng(4).integers(0, 512, (11, 40))


@pytest.mark.parametrize("tied", [True, False])
def test_divergences_are_those_of_the_engine(tied: bool, tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    model = write_random_llama(tmp_path / "model", layers=2, tied=tied)
    out = compress_folder(model, tmp_path / "out", CodingOptions(target=Target(bits_per_weight=3.0))).path
    found = summarize_divergences(*compare(model, out, WINDOWS, TorchDevice("cpu"), threads=1))
    evaluations, _ = evaluate([load(out)], Windows(WINDOWS, 1, 1), load(model))
    wanted = evaluations[0].divergence
    assert wanted is not None
    assert wanted.mean > 0.01
    assert found.mean == pytest.approx(wanted.mean, rel=1e-3)
    assert found.percentile_99 == pytest.approx(wanted.percentile_99, rel=1e-2)
    assert found.standard_error == pytest.approx(wanted.standard_error, rel=1e-2)
    assert found.top1_agreement == pytest.approx(wanted.top1_agreement, abs=0.01)


def test_a_search_with_a_gpu_measures_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "model").mkdir()
    model = write_random_llama(tmp_path / "model", layers=1, tied=True)
    monkeypatch.setattr(calibrated, "open_device", lambda *_: TorchDevice("cpu"))
    monkeypatch.setattr(search, "load", lambda *_, **__: pytest.fail("the engine was asked"))
    options = CompressOptions(max_kl=0.3, calibration="self", sampled=8, device="cuda", seed=3)
    result = compress(model, tmp_path / "out", options)
    assert result.search is not None
    assert result.search.divergence.mean <= 0.3
    assert result.search.predictions == 16 * (result.search.predictions // 16) > 0
