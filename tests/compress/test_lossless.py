"""Folders of lossless matrices: every bit survives, and what is damaged or does not fit is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from entrollm import _core
from entrollm.checkpoint.model_folder import Checkpoint
from entrollm.compress import CodingOptions, compress_folder
from entrollm.compress.describe import describe
from entrollm.compress.export import export
from entrollm.compress.predict import plan
from entrollm.compress.target import Target
from entrollm.compress.verify import verify
from entrollm.errors import CorruptStreamError, FormatError
from entrollm.format import layout
from entrollm.format.flat import FlatCode
from entrollm.format.reader import CompressedModel
from entrollm.format.stored import StoredMatrix
from entrollm.format.writer import ShardWriter
from entrollm.matrix import matrix_of, multiply, open_matrix
from entrollm.quantize.select import BitsOverride
from tests.support.lossless_cases import BF16, lossless_cases, write_tensors

ALL = CodingOptions(lossless=("*",), threads=1)
KEPT = {"real.weight": np.linspace(-1, 1, 64, dtype=np.float32).reshape(8, 8), "norm.weight": np.ones(5, BF16)}


@pytest.fixture(scope="module")
def pool() -> _core.ThreadPool:
    return _core.ThreadPool(1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of every case in `source`, and its lossless form in `coded`."""
    path = tmp_path_factory.mktemp("lossless")
    write_tensors(path / "source", lossless_cases() | KEPT)
    compress_folder(path / "source", path / "coded", ALL)
    return path


def test_every_bit_survives_in_the_file_the_export_and_the_matrix(
    folder: Path, tmp_path: Path, pool: _core.ThreadPool
) -> None:
    with CompressedModel.open(folder / "coded") as model, Checkpoint.open(folder / "source") as source:
        assert set(model.specs) == set(lossless_cases())
        assert set(model.plain) == set(KEPT)  # float32 whose lower halves are needed, and vectors
        assert verify(model, pool, source).compared
        for name, weights in lossless_cases().items():
            matrix = matrix_of(model, name)
            found = matrix.original(0, len(weights), pool)
            assert (found.dtype, found.tobytes()) == (weights.dtype, weights.tobytes())
            values = matrix.dequantize(np.arange(len(weights)), pool)
            np.testing.assert_array_equal(values, weights.astype(np.float32))
        export(model, tmp_path / "out", pool)
    with Checkpoint.open(tmp_path / "out") as exported:
        for name, weights in (lossless_cases() | KEPT).items():
            assert exported.read(name).tobytes() == weights.tobytes()
            assert exported.read(name).dtype == weights.dtype


def test_sizes_are_near_the_entropy_of_exponents_and_a_byte(tmp_path: Path, pool: _core.ThreadPool) -> None:
    weights = np.random.default_rng(0).standard_normal((512, 2048), np.float32).astype(BF16)
    write_tensors(tmp_path / "source", {"a.weight": weights})
    result = compress_folder(tmp_path / "source", tmp_path / "out", ALL)
    exponents = np.bincount((weights.view(np.uint16) >> 7 & 0xFF).reshape(-1)) / weights.size
    bits = 8 + -sum(p * np.log2(p) for p in exponents if p)
    assert bits < result.file_bits < 1.01 * bits
    with CompressedModel.open(tmp_path / "out") as model:
        assert describe(model, pool).entropy_bits == pytest.approx(bits)
    assert plan(tmp_path / "source", ALL).file_bits == pytest.approx(result.file_bits, rel=0.02)


def test_flat_exponents_are_as_exact(folder: Path, tmp_path: Path, pool: _core.ThreadPool) -> None:
    options = CodingOptions(lossless=("*",), prefer="speed", processor="x86", threads=1)
    compress_folder(folder / "source", tmp_path / "flat", options)
    with (
        CompressedModel.open(folder / "coded") as coded,
        CompressedModel.open(tmp_path / "flat") as model,
        Checkpoint.open(folder / "source") as source,
    ):
        assert verify(model, pool, source).compared
        flat = [name for name, spec in model.specs.items() if isinstance(spec.code, FlatCode)]
        assert {"bf16.weight", "f16.weight", "parts.weight"} <= set(flat)
        for name in flat:
            x = np.ones((1, model.specs[name].columns), np.float32)
            pair = [multiply([matrix_of(each, name)], x, pool) for each in (model, coded)]
            np.testing.assert_array_equal(*pair)


def test_some_matrices_are_lossless_and_others_meet_the_size(tmp_path: Path, pool: _core.ThreadPool) -> None:
    generator = np.random.default_rng(1)
    tensors = {f"{name}.weight": generator.standard_normal((200, 320), np.float32).astype(BF16) for name in "abc"}
    write_tensors(tmp_path / "source", tensors)
    options = CodingOptions(
        target=Target(bits_per_weight=9.5), lossless=("a*", "b*"), overrides=(BitsOverride("b*", None),), threads=1
    )
    result = compress_folder(tmp_path / "source", tmp_path / "out", options)
    assert 9.5 * 0.99 < result.file_bits <= 9.5 * 1.005
    with CompressedModel.open(tmp_path / "out") as model, Checkpoint.open(tmp_path / "source") as source:
        verify(model, pool, source)
        grids = {name: spec.grid_name for name, spec in model.specs.items()}
        assert grids["a.weight"] == "lossless"
        assert grids["c.weight"] != "lossless"
        assert model.plain == ("b.weight",)


def test_a_glob_that_matches_no_matrix_is_refused(folder: Path, tmp_path: Path) -> None:
    options = CodingOptions(lossless=("norm*",))
    with pytest.raises(ValueError, match=r"'norm\*' matches no matrix"):
        compress_folder(folder / "source", tmp_path / "out", options)


def test_another_original_is_found(folder: Path, tmp_path: Path, pool: _core.ThreadPool) -> None:
    changed = lossless_cases() | KEPT
    changed["words.weight"] = changed["words.weight"].copy()
    changed["words.weight"].view(np.uint16)[200, 3] ^= 1  # perhaps another NaN
    write_tensors(tmp_path / "source", changed)
    with (
        CompressedModel.open(folder / "coded") as model,
        Checkpoint.open(tmp_path / "source") as source,
        pytest.raises(FormatError, match=r"words.weight: its weights are not bit for bit"),
    ):
        verify(model, pool, source)


def _entries(folder: Path, name: str) -> tuple[Any, dict[str, NDArray[Any]]]:
    with CompressedModel.open(folder / "coded") as model:
        return model.specs[name], {suffix: np.array(array) for suffix, array in model.entries(name).items()}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda entries: entries.pop(layout.LOW), "lacks low"),
        (lambda entries: entries.update({layout.LOW: entries[layout.LOW][:-64]}), "the low bytes take"),
        (lambda entries: entries.update({".scale": np.ones(40, np.float32)}), "has scale"),
    ],
)
def test_entries_that_do_not_fit_are_refused(folder: Path, change: Any, message: str) -> None:
    spec, entries = _entries(folder, "bf16.weight")
    change(entries)
    with pytest.raises(FormatError, match=message):
        open_matrix("bf16.weight", spec, entries)


def test_low_bytes_of_words_of_8_bits_are_refused(folder: Path) -> None:
    spec, entries = _entries(folder, "e4m3.weight")
    with pytest.raises(FormatError, match="has low, which its spec does not declare"):
        open_matrix("e4m3.weight", spec, entries | {layout.LOW: np.zeros(384, np.uint8)})


def test_padding_that_is_not_zero_is_found(folder: Path, tmp_path: Path, pool: _core.ThreadPool) -> None:
    spec, entries = _entries(folder, "bf16.weight")
    entries[layout.LOW][-1] = 1
    (tmp_path / "config.json").write_bytes((folder / "coded" / "config.json").read_bytes())
    with ShardWriter(tmp_path / "model.safetensors") as writer:
        writer.add_matrix(StoredMatrix.seal("bf16.weight", spec, entries))
    with (
        CompressedModel.open(tmp_path) as model,
        pytest.raises(CorruptStreamError, match="the padding after its low bytes is not zero"),
    ):
        verify(model, pool)
