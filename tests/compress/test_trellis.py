"""Folders whose matrices have a trellis: as large as requested, closer to the original, the same in every form."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import entrollm
from entrollm import CompressOptions
from entrollm.checkpoint.model_folder import Checkpoint
from entrollm.compress import CodingOptions, Target, compress_folder, plan
from entrollm.compress.verify import verify
from entrollm.engine.load import load
from entrollm.format.grid import GridKind
from entrollm.format.reader import CompressedModel
from entrollm.threads import start_pool
from tests.support.checkpoints import write_random_llama


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_random_llama(tmp_path_factory.mktemp("source"), layers=2, tied=False)


@pytest.fixture(scope="module")
def folders(source: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Without and with a trellis, at 4 bits per weight."""
    out = tmp_path_factory.mktemp("out")
    for name, trellis in (("plain", False), ("trellis", True)):
        compress_folder(source, out / name, CodingOptions(target=Target(bits_per_weight=4.0), trellis=trellis))
    return out / "plain", out / "trellis"


def test_a_trellis_is_closer_at_the_same_size(folders: tuple[Path, Path]) -> None:
    errors, sizes = [], []
    for folder, trellis in zip(folders, (False, True), strict=True):
        with CompressedModel.open(folder) as model:
            kinds = [spec.kind for spec in model.specs.values()]
            assert all(isinstance(kind, GridKind) and kind.trellis is trellis for kind in kinds)
            errors.append(np.mean([spec.relative_error for spec in model.specs.values()]))
        sizes.append(sum(file.stat().st_size for file in folder.glob("*.safetensors")))
    assert sizes[1] == pytest.approx(sizes[0], rel=0.01)
    assert errors[1] < 0.94 * errors[0]


def test_the_stated_errors_are_those_of_the_decoded_weights(source: Path, folders: tuple[Path, Path]) -> None:
    with CompressedModel.open(folders[1]) as model, Checkpoint.open(source) as original:
        assert verify(model, start_pool(1), original).matrices == len(model.specs)


def test_models_run_alike_from_the_file_and_from_memory(source: Path, folders: tuple[Path, Path]) -> None:
    ids = np.arange(40, dtype=np.int64)
    original, plain = (load(folder).logits(ids) for folder in (source, folders[0]))
    found = [load(folders[1], memory=memory).logits(ids) for memory in ("file", "fast")]
    np.testing.assert_array_equal(found[0], found[1])
    # Errors of logits depend on chance in so small a model.
    assert np.square(found[0] - original).mean() < 1.2 * np.square(plain - original).mean()


def test_a_plan_predicts_size_and_gain(source: Path, folders: tuple[Path, Path]) -> None:
    planned = [
        plan(source, CodingOptions(target=Target(bits_per_weight=4.0), trellis=trellis)) for trellis in (False, True)
    ]
    size = sum(file.stat().st_size for file in folders[1].glob("*.safetensors"))
    assert planned[1].file_bytes == pytest.approx(size, rel=0.01)
    assert 0.85 < planned[1].relative_error / planned[0].relative_error < 0.94


def test_matrices_at_the_finest_steps_lie_on_one_grid(source: Path, tmp_path: Path) -> None:
    options = CompressOptions(bpw=7.2, trellis=True, measure=False)
    result = entrollm.compress(source, tmp_path / "out", options)
    assert result.file_bits == pytest.approx(7.2, rel=0.005)
    with CompressedModel.open(tmp_path / "out") as model:
        found = {name: isinstance(spec.kind, GridKind) and spec.kind.trellis for name, spec in model.specs.items()}
    assert not found["model.layers.0.self_attn.v_proj.weight"]
    assert found["model.layers.1.self_attn.q_proj.weight"]
