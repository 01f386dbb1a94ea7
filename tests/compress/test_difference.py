"""Models as differences to their base: restored bit for bit, with this base alone, and not run by mistake."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from ml_dtypes import float8_e4m3fn
from numpy.typing import NDArray

from entrollm import CompressOptions, _core, compress
from entrollm.checkpoint.model_folder import Checkpoint
from entrollm.compress import difference
from entrollm.compress.difference import NEAR, add_differences, differences, restored_matrices
from entrollm.compress.export import export
from entrollm.compress.verify import verify
from entrollm.errors import CorruptStreamError, EntroLLMError, FormatError, OptionError, UnsupportedError
from entrollm.format import layout
from entrollm.format.reader import CompressedModel
from tests.support.lossless_cases import BF16, write_tensors

POOL = _core.ThreadPool(1)


def gaussian(rows: int, columns: int, seed: int = 0) -> NDArray[np.float32]:
    return (np.random.default_rng(seed).standard_normal((rows, columns)) * 0.02).astype(np.float32)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, a model that was trained a little further, and its differences in `coded`."""
    path = tmp_path_factory.mktemp("difference")
    base = {
        "near.weight": gaussian(300, 130).astype(BF16),
        "half.weight": gaussian(40, 65).astype(np.float16),
        "other.weight": gaussian(64, 64).astype(BF16),
        "norm.weight": np.ones(5, BF16),
    }
    near, half = gaussian(300, 130) + 1e-3 * gaussian(300, 130, 1), gaussian(40, 65)
    near[7, 9] = 3.0  # far away
    half[3, 4] = np.nan
    model = {
        "near.weight": near.astype(BF16),
        "half.weight": half.astype(np.float16),
        "other.weight": gaussian(64, 64, 1).astype(BF16),
        "norm.weight": np.full(5, 1.5, BF16),
        "new.weight": gaussian(32, 64).astype(BF16),
    }
    write_tensors(path / "base", base)
    write_tensors(path / "model", model)
    options = CompressOptions(lossless=True, base=path / "base", threads=1)
    result = compress(path / "model", path / "coded", options)
    assert result.weights == sum(array.size for array in model.values())
    assert result.file_bits < 8
    return path


def restore(coded: Path, base: Path, out: Path) -> None:
    with CompressedModel.open(coded, restores=True) as model, Checkpoint.open(base) as opened:
        export(model, out, POOL, base=opened)


@given(st.lists(st.tuples(st.integers(0, 65535), st.integers(0, 65535)), min_size=1))
def test_every_pair_of_words_comes_back(pairs: list[tuple[int, int]]) -> None:
    words, base = np.array(pairs, np.uint16).T.copy()
    np.testing.assert_array_equal(add_differences(differences(words, base), base), words)


def test_neighbours_differ_by_little() -> None:
    words = np.array([1.0, -1.0, 0.0, -0.0], BF16).view(np.uint16)
    np.testing.assert_array_equal(differences(words, words), np.zeros(4, np.uint16))
    np.testing.assert_array_equal(differences(words + np.uint16(1), words), [2, 1, 2, 1])  # a negative one falls
    assert differences(words[3:], words[2:3]) == 1  # -0 is next to 0


def test_the_model_comes_back_bit_for_bit(folder: Path, tmp_path: Path) -> None:
    restore(folder / "coded", folder / "base", tmp_path / "out")
    with Checkpoint.open(tmp_path / "out") as found, Checkpoint.open(folder / "model") as expected:
        assert set(found.tensors) == set(expected.tensors)
        for name, info in expected.tensors.items():
            assert found.tensors[name].dtype == info.dtype
            assert found.array(name).tobytes() == expected.array(name).tobytes(), name
    assert not (tmp_path / "out" / layout.DIFFERENCE_NAME).exists()


def test_only_matrices_that_become_smaller_are_differences(folder: Path) -> None:
    with CompressedModel.open(folder / "coded", restores=True) as model:
        assert {name for name in model.specs if name.endswith(NEAR)} == {"near.weight" + NEAR, "half.weight" + NEAR}
        assert {"other.weight", "new.weight"} < set(model.specs)
        assert verify(model, POOL).matrices == 4


def test_the_folder_does_not_open_as_a_model(folder: Path) -> None:
    with pytest.raises(UnsupportedError, match=r"restore it first, with `entrollm export .* --base BASE`"):
        CompressedModel.open(folder / "coded")


def test_another_base_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(FormatError, match=r"model is not the base of .*coded: its 'near.weight' has CRC-32"):
        restore(folder / "coded", folder / "model", tmp_path / "out")
    write_tensors(tmp_path / "small", {"near.weight": gaussian(2, 2).astype(BF16)})
    with pytest.raises(
        FormatError, match=r"small is not the base of .*: it has no 'near.weight' of its type and shape"
    ):
        restore(folder / "coded", tmp_path / "small", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_folders_without_differences_are_refused(folder: Path, tmp_path: Path) -> None:
    compress(folder / "model", tmp_path / "coded", CompressOptions(lossless=True, threads=1, measure=False))
    with pytest.raises(FormatError, match="holds no differences; export it without a base"):
        restore(tmp_path / "coded", folder / "base", tmp_path / "out")
    with pytest.raises(EntroLLMError, match=r"no matrix of .* takes fewer bits as a difference"):
        write_tensors(tmp_path / "far", {"other.weight": gaussian(64, 64, 2).astype(BF16)})
        compress(tmp_path / "far", tmp_path / "out", CompressOptions(lossless=True, base=folder / "base"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["coded", "far"]


def test_options_that_do_not_go_with_a_base(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="base='x' goes with lossless"):
        CompressOptions(base="x")
    with (
        CompressedModel.open(folder / "coded", restores=True) as model,
        Checkpoint.open(folder / "base") as base,
        pytest.raises(ValueError, match="restored to the original types, not to f32"),
    ):
        export(model, tmp_path / "out", POOL, "f32", base=base)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda found: found.clear(), "expected matrices, each with base_crc32, crc32, dtype"),
        (lambda found: found["matrices"]["near.weight"].pop("crc32"), "expected matrices, each with"),
        (lambda found: found["matrices"]["near.weight"].update(crc32="1f"), "expected matrices, each with"),
        (lambda found: found["matrices"]["near.weight"].update(base_crc32=[]), "expected matrices, each with"),
        (lambda found: found["matrices"].update(x=found["matrices"]["near.weight"]), "'x' has no differences"),
        (lambda found: found["matrices"]["near.weight"].update(dtype="F32"), "'near.weight' has no differences"),
    ],
)
def test_malformed_descriptions_are_refused(folder: Path, tmp_path: Path, change, message: str) -> None:  # type: ignore[no-untyped-def]
    shutil.copytree(folder / "coded", tmp_path / "coded")
    path = tmp_path / "coded" / layout.DIFFERENCE_NAME
    found = json.loads(path.read_text())
    change(found)
    path.write_text(json.dumps(found))
    with (
        CompressedModel.open(tmp_path / "coded", check=False, restores=True) as model,
        Checkpoint.open(folder / "base") as base,
        pytest.raises(FormatError, match=message),
    ):
        export(model, tmp_path / "out", POOL, base=base)


def test_grids_are_no_differences(folder: Path, tmp_path: Path) -> None:
    weights = np.abs(gaussian(300, 130)).astype(float8_e4m3fn)
    write_tensors(tmp_path / "model", {"near.weight" + NEAR: weights})
    compress(tmp_path / "model", tmp_path / "coded", CompressOptions(bits=4, threads=1, measure=False))
    shutil.copy(folder / "coded" / layout.DIFFERENCE_NAME, tmp_path / "coded")
    with (
        CompressedModel.open(tmp_path / "coded", check=False, restores=True) as model,
        Checkpoint.open(folder / "base") as base,
        pytest.raises(FormatError, match=r"'near.weight' has no differences"),
    ):
        restored_matrices(model, base)


def test_kept_matrices_are_no_differences(folder: Path, tmp_path: Path) -> None:
    options = CompressOptions(lossless=True, base=folder / "base", keep=["near.weight"], threads=1)
    compress(folder / "model", tmp_path / "coded", options)
    with CompressedModel.open(tmp_path / "coded", restores=True) as model:
        assert "near.weight" in model.plain
        assert "half.weight" + NEAR in model.specs
    restore(tmp_path / "coded", folder / "base", tmp_path / "out")


def test_quantized_checkpoints_are_refused(folder: Path, tmp_path: Path) -> None:
    """Scales of fp8 are no tensors of their own, and would be lost."""
    tensors = {"near.weight": gaussian(300, 130).astype(BF16), "a.weight": gaussian(64, 64).astype(float8_e4m3fn)}
    write_tensors(tmp_path / "model", {**tensors, "a.weight_scale_inv": np.ones((1, 1), np.float32)})
    with pytest.raises(UnsupportedError, match=r"model is quantized \(fp8\), and only ordinary weights"):
        compress(tmp_path / "model", tmp_path / "coded", CompressOptions(lossless=True, base=folder / "base"))
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_an_output_that_exists_is_refused_first(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(difference, "write_difference", None)
    with pytest.raises(OptionError, match=r"coded exists; name another folder"):
        compress(folder / "model", folder / "coded", CompressOptions(lossless=True, base=folder / "base"))


def test_what_a_killed_run_left_is_removed(folder: Path, tmp_path: Path) -> None:
    (tmp_path / ".coded.difference-killed").mkdir()
    compress(folder / "model", tmp_path / "coded", CompressOptions(lossless=True, base=folder / "base", threads=1))
    assert [path.name for path in tmp_path.iterdir()] == ["coded"]


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        (np.zeros(0, np.float32), "has 0 numbers, fewer than there are far differences"),
        (np.array([-1.0], np.float32), "has numbers that are not differences"),
        (np.array([300.5], np.float32), "has numbers that are not differences"),
        (np.array([[300.0]], np.float32), r"is F32 \[1, 1\], not a list of F32"),
    ],
)
def test_damaged_lists_are_refused(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, numbers: NDArray[np.float32], message: str
) -> None:
    monkeypatch.setattr(CompressedModel, "array", lambda self, name: numbers)
    monkeypatch.setattr(CompressedModel, "check_checksum", lambda self, name: None)
    with (
        CompressedModel.open(folder / "coded", restores=True) as model,
        Checkpoint.open(folder / "base") as base,
        pytest.raises(CorruptStreamError, match=message),
    ):
        for matrix in restored_matrices(model, base).values():
            list(matrix.chunks(POOL))


def test_wrong_weights_are_not_restored(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "coded", tmp_path / "coded")
    path = tmp_path / "coded" / layout.DIFFERENCE_NAME
    found = json.loads(path.read_text())
    found["matrices"]["near.weight"]["crc32"] ^= 1
    path.write_text(json.dumps(found))
    with (
        CompressedModel.open(tmp_path / "coded", check=False, restores=True) as model,
        Checkpoint.open(folder / "base") as base,
        pytest.raises(CorruptStreamError, match=r"near.weight: the restored weights have CRC-32"),
    ):
        export(model, tmp_path / "out", POOL, base=base)
    assert not (tmp_path / "out").exists()
