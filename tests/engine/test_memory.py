"""Where matrices are held: in the file, or flat in memory, with the same logits bit for bit."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from entrollm import CompressOptions, _core, compress, load
from entrollm.engine import memory
from entrollm.engine.linear import CodedWeights
from entrollm.engine.memory import MemoryPlan, check_memory, is_faster_flat, is_fused
from entrollm.engine.memory_report import report_memory
from entrollm.errors import CorruptStreamError
from entrollm.format.blocks import Blocks
from entrollm.format.code import Code, Field, Leaf, Split
from entrollm.format.flat import FlatCode
from entrollm.format.grid import GridKind
from entrollm.format.group_scales import GroupedKind
from entrollm.format.lossless import LosslessKind
from entrollm.format.reader import CompressedModel
from entrollm.format.spec import Kind, TensorSpec
from entrollm.matrix import matrix_of
from entrollm.system import memory_bytes
from tests.engine.architectures import random_ids
from tests.support.folders import write_example
from tests.support.paths import GOLDEN, TINY_LLAMA

CASCADE = Code(Field(2, (0, 1, 2), Field(1, (3, 4))))
TREE = Code(Split(Field(1, (0, 1)), Field(1, (2, 3))))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("memory") / "coded"
    compress(TINY_LLAMA, path, CompressOptions(bits=4, threads=2))
    return path


def wait_for_transcoding() -> None:
    for thread in threading.enumerate():
        if thread.name == "entrollm-prepare":
            thread.join()


@pytest.mark.parametrize("choice", ["auto", "fast"])
def test_logits_do_not_depend_on_the_choice(folder: Path, choice: memory.Memory) -> None:
    ids = random_ids(40)
    expected = load(folder, threads=2, memory="file").logits(ids)
    model = load(folder, threads=2, memory=choice)
    np.testing.assert_array_equal(model.logits(ids), expected)  # while they are transcoded, or after
    wait_for_transcoding()
    np.testing.assert_array_equal(model.logits(ids), expected)


def test_fast_transcodes_what_is_multiplied_with(folder: Path) -> None:
    with CompressedModel.open(folder) as model:
        weights = CodedWeights(model, 2, "fast")
        names = [name for name in model.specs if "layers.0" in name]
        linears = [weights.linear(name) for name in names]
        embedding = weights.embedding("model.embed_tokens.weight")
        rows = embedding.rows(np.array([3, 5]))
        weights.prepare()
        wait_for_transcoding()
        assert all(weights._slots[name].matrix.is_flat for name in names)
        assert not weights._slots["model.embed_tokens.weight"].matrix.is_flat  # rows are read from the file
        for name, linear in zip(names, linears, strict=True):
            x = np.random.default_rng(1).standard_normal((3, linear.shape[1])).astype(np.float32)
            np.testing.assert_array_equal(linear(x), CodedWeights(model, 1).linear(name)(x))
        head = weights.linear("model.embed_tokens.weight")  # a tied embedding becomes flat when it is multiplied with
        head(np.zeros((1, head.shape[1]), np.float32))
        assert weights._slots["model.embed_tokens.weight"].matrix.is_flat
        np.testing.assert_array_equal(embedding.rows(np.array([3, 5])), rows)


def test_many_threads_transcode_a_matrix_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = []

    class Counting(_core.FlatMatrix):  # type: ignore[misc]
        def __new__(cls, coded: _core.CodedMatrix, pool: _core.ThreadPool) -> _core.FlatMatrix:
            made.append(coded)
            return _FlatMatrix(coded, pool)

    _FlatMatrix = _core.FlatMatrix
    with CompressedModel.open(folder) as model:
        name = next(iter(model.specs))
        weights = CodedWeights(model, 2, "fast")
        linear = weights.linear(name)
        x = np.random.default_rng(2).standard_normal((2, linear.shape[1])).astype(np.float32)
        expected = CodedWeights(model, 1).linear(name)(x)
        monkeypatch.setattr("entrollm.matrix._core.FlatMatrix", Counting)
        found = []
        threads = [threading.Thread(target=lambda: found.append(linear(x))) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(made) == 1 and len(found) == 8
    for y in found:
        np.testing.assert_array_equal(y, expected)


def test_without_memory_a_matrix_stays_in_the_file(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(coded: object, pool: object) -> None:
        raise MemoryError

    with CompressedModel.open(folder) as model:
        name = next(iter(model.specs))
        weights = CodedWeights(model, 1, "fast")
        linear = weights.linear(name)
        monkeypatch.setattr("entrollm.matrix._core.FlatMatrix", _raising(fail))
        with caplog.at_level(logging.WARNING, "entrollm"):
            linear(np.zeros((1, linear.shape[1]), np.float32))
        assert f"{name} stays in the file: the memory does not suffice" in caplog.text


def _raising(make: Callable[[object, object], None]) -> type:
    class Raising:
        def __new__(cls, coded: object, pool: object) -> Raising:
            make(coded, pool)
            return super().__new__(cls)

    return Raising


def test_a_damaged_matrix_is_named_when_it_is_multiplied_with(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(coded: object, pool: object) -> None:
        raise _core.CorruptBlockError("block 3 does not decode")

    with CompressedModel.open(folder) as model:
        name = next(iter(model.specs))
        weights = CodedWeights(model, 1, "fast")
        linear = weights.linear(name)
        monkeypatch.setattr("entrollm.matrix._core.FlatMatrix", _raising(fail))
        weights.prepare()
        wait_for_transcoding()
        with pytest.raises(CorruptStreamError, match=f"{name}: block 3 does not decode"):
            linear(np.zeros((1, linear.shape[1]), np.float32))


def test_group_scales_have_no_flat_form(tmp_path: Path) -> None:
    with CompressedModel.open(write_example(tmp_path / "example")) as model:
        grouped = [m for m in (matrix_of(model, name) for name in model.specs) if m.groups is not None]
        for matrix in grouped:
            assert not matrix.can_be_flat
            with pytest.raises(ValueError, match="matrices with group scales have no flat form"):
                matrix.to_flat(_core.ThreadPool(1))


def test_half_steps_of_a_trellis_are_multiplied_alike_in_every_form() -> None:
    with CompressedModel.open(GOLDEN / "v2-trellis") as model:
        forms = {memory: CodedWeights(model, 2, memory) for memory in ("file", "auto", "fast")}
        for name, spec in model.specs.items():
            for batch in (1, 3, 20):
                x = np.random.default_rng(batch).standard_normal((batch, spec.columns)).astype(np.float32)
                expected = forms["file"].linear(name)(x)
                for weights in forms.values():
                    np.testing.assert_array_equal(weights.linear(name)(x), expected)
            rows = forms["fast"].embedding(name).rows(np.array([1]))
            np.testing.assert_array_equal(rows, forms["file"].embedding(name).rows(np.array([1])))
        assert all(slot.matrix.is_flat for slot in forms["fast"]._slots.values())
        assert not any(slot.matrix.is_flat for slot in forms["file"]._slots.values())


def test_what_is_fused() -> None:
    assert is_fused(CASCADE)
    assert is_fused(Code(Field(4, tuple(range(0, 256, 16))), low_bits=4))
    assert not is_fused(Code(Field(3, tuple(range(0, 256, 32))), low_bits=5))
    assert not is_fused(TREE)
    assert not is_fused(Code(Leaf(3)))
    assert not is_fused(Code(Field(8, ())))
    assert is_fused(Code(Field(2, (0, 1, 2), Field(8, ()))))


def spec_of(code: Code, kind: Kind) -> TensorSpec:
    return TensorSpec(8, 64, "BF16", "any", code, Blocks(8, 64), kind)


def test_what_is_faster_flat() -> None:
    cascade, tree = spec_of(CASCADE, GridKind(1.0)), spec_of(TREE, GridKind(1.0))
    grouped = spec_of(CASCADE, GroupedKind(32, {"group_scale": "F16"}))
    for isa in ("avx2", "avx2-vnni", "neon", "neon-dot", "neon-i8mm"):
        assert is_faster_flat(cascade, isa, 16) and is_faster_flat(tree, isa, 16)
    for isa in ("avx512", "amx"):
        assert is_faster_flat(cascade, isa, 4) and not is_faster_flat(cascade, isa, 5)
        assert is_faster_flat(tree, isa, 16) and is_faster_flat(grouped, isa, 16)
    stored_flat = replace(cascade, code=FlatCode(64))
    assert is_faster_flat(stored_flat, "avx512", 16) and not is_faster_flat(stored_flat, "scalar", 1)
    assert not is_faster_flat(replace(stored_flat, rows=2**13, columns=2**10), "avx2", 1)
    for spec in (cascade, replace(stored_flat, rows=2**13, columns=2**10)):
        assert is_faster_flat(replace(spec, kind=GridKind(1.0, trellis=True)), "avx512", 16)
    assert not is_faster_flat(tree, "scalar", 1) and not is_faster_flat(grouped, "scalar", 1)


def test_lossless_matrices_stay_coded_where_they_are_decoded_while_multiplying() -> None:
    def spec(code: Code, columns: int = 1024, words: str = "BF16", width: int = 1024) -> TensorSpec:
        return TensorSpec(8, columns, words, "lossless", code, Blocks(8, width), LosslessKind(words))

    for threads in (1, 16):
        assert not is_faster_flat(spec(CASCADE), "avx512", threads)
        assert is_faster_flat(spec(CASCADE), "avx2", threads)
        for other in (
            spec(TREE),
            spec(CASCADE, columns=576),
            spec(CASCADE, words="F16"),
            spec(CASCADE, width=64),
            spec(Code(Field(5, tuple(range(31)), Field(8, ())))),
            spec(Code(CASCADE.tree, low_bits=1)),
        ):
            assert is_faster_flat(other, "avx512", threads)


def test_auto_needs_the_memory(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "is_faster_flat", lambda spec, isa, threads: True)
    with CompressedModel.open(folder) as model:
        assert MemoryPlan(model, "file", 2).flat == frozenset()
        assert MemoryPlan(model, "auto", 2).flat == frozenset(model.specs)
        needed = MemoryPlan(model, "auto", 2).flat_bytes
        stored = sum(matrix_of(model, name).stored_bytes for name in model.specs)
        assert stored < needed < 2 * stored
        monkeypatch.setattr(memory, "available_memory_bytes", lambda: needed)
        assert MemoryPlan(model, "auto", 2).flat == frozenset()
        assert MemoryPlan(model, "fast", 2).flat == frozenset(model.specs)
        monkeypatch.setattr(memory, "available_memory_bytes", lambda: None)
        assert MemoryPlan(model, "auto", 2).flat == frozenset(model.specs)


def test_the_estimate_of_auto_is_no_less_than_what_is_taken(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "is_faster_flat", lambda spec, isa, threads: True)
    with CompressedModel.open(folder) as model:
        report = report_memory(model, _core.ThreadPool(2))
        assert report.memory_bytes("fast")[0] <= 1.02 * MemoryPlan(model, "auto", 2).flat_bytes
        assert report.memory_bytes("auto") == report.memory_bytes("fast")
        assert report.memory_bytes("file") == (0, sum(matrix_of(model, name).stored_bytes for name in model.specs))


def test_available_memory_is_read_where_linux_has_it(tmp_path: Path) -> None:
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal:       4000 kB\nMemAvailable:   3000 kB\n")
    assert memory._machine_memory(meminfo) == 3000 * 1024
    assert memory._machine_memory(tmp_path / "absent") == memory_bytes() // 2
    assert memory._group_memory(tmp_path) is None
    (tmp_path / "memory.max").write_text("1000\n")
    (tmp_path / "memory.current").write_text("700\n")
    (tmp_path / "memory.stat").write_text("anon 500\ninactive_file 150\n")
    assert memory._group_memory(tmp_path) == 450
    (tmp_path / "memory.max").write_text("max\n")
    assert memory._group_memory(tmp_path) is None
    assert memory.available_memory_bytes() is not None


def test_other_choices_are_refused(folder: Path) -> None:
    assert check_memory("fast") == "fast"
    with pytest.raises(ValueError, match="memory should be one of auto, file, fast, found 'slow'"):
        load(folder, memory="slow")  # type: ignore[arg-type]
