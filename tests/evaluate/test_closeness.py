"""How close a model stayed: measured in little memory, and the same as with the whole original in memory."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from entrollm import CompressOptions, compress, load
from entrollm.checkpoint.model_folder import Checkpoint
from entrollm.engine import streamed
from entrollm.engine.files import ModelFiles
from entrollm.engine.model import Model
from entrollm.engine.streamed import StreamedWeights
from entrollm.evaluate import Windows, evaluate
from entrollm.evaluate.closeness import TEXT, TOKENS, measure_closeness
from tests.support.paths import TINY_LLAMA


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("closeness") / "out"
    return compress(TINY_LLAMA, out, CompressOptions(bpw=4.5, measure=False)).path


def test_it_is_that_of_an_evaluation(out: Path) -> None:
    model = load(out)
    ids = np.array(model.encode(TEXT)[:TOKENS])
    assert len(ids) == TOKENS  # the text is long enough
    (expected,), original = evaluate([model], Windows(ids[np.newaxis], 1, 1), load(TINY_LLAMA))
    assert expected.divergence is not None and original is not None
    seen: list[tuple[float, float]] = []
    found = measure_closeness(TINY_LLAMA, out, 2, lambda done, total: seen.append((done, total)))
    assert found.kl == pytest.approx(expected.divergence.mean, rel=1e-3)
    assert found.top1_agreement == pytest.approx(expected.divergence.top1_agreement, abs=0.005)
    assert found.perplexity == pytest.approx(expected.perplexity.perplexity)
    assert found.original_perplexity == pytest.approx(original.perplexity.perplexity, rel=1e-4)
    assert found.predictions == TOKENS - 1
    assert seen == [(TOKENS, TOKENS)]


def test_a_streamed_model_is_that_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streamed, "_CHUNK_WEIGHTS", 5000)
    ids = np.array([5, 900, 5, 17])
    with Checkpoint.open(TINY_LLAMA) as checkpoint:
        model = Model(ModelFiles(checkpoint.config), StreamedWeights(checkpoint))
        np.testing.assert_allclose(model.logits(ids), load(TINY_LLAMA).logits(ids), rtol=1e-4, atol=1e-3)


def test_a_model_that_the_engine_does_not_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no such folder"):
        measure_closeness(TINY_LLAMA, tmp_path / "nothing")
