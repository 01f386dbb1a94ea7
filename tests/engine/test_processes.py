"""Loaded models in forked processes, and memory that runs out."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from entrollm import CompressOptions, Model, _core, compress, load
from entrollm.engine.memory import Memory
from entrollm.format.reader import CompressedModel
from entrollm.matrix import matrix_of
from tests.support.paths import TINY_LLAMA

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")

IDS = list(range(1, 40))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("processes") / "coded"
    compress(TINY_LLAMA, path, CompressOptions(bpw=4, threads=1))
    return path


def in_child(body: Callable[[], bool]) -> None:
    """Run `body` in a forked process, which must return True and end by itself."""
    child = os.fork()
    if child == 0:
        try:
            signal.alarm(60)
            holds = body()
        except BaseException as error:
            os.write(2, repr(error).encode())
            os._exit(2)
        os._exit(0 if holds else 1)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 0


@pytest.mark.parametrize("memory", ["file", "fast"])
@pytest.mark.parametrize("is_prepared", [False, True])
def test_a_forked_process_computes_the_same(folder: Path, memory: Memory, is_prepared: bool) -> None:
    expected = load(folder, threads=1, memory=memory).logits(IDS).tobytes()
    model = load(folder, threads=3, memory=memory)  # while a thread checks and transcodes, or after
    if is_prepared:
        assert model.logits(IDS).tobytes() == expected
    in_child(lambda: model.logits(IDS).tobytes() == expected)
    assert model.logits(IDS).tobytes() == expected


def test_a_forked_process_can_fork_and_end(folder: Path) -> None:
    models: list[Model] = [load(folder, threads=2)]
    expected = models[0].logits(IDS).tobytes()

    def grandchild() -> bool:
        in_child(lambda: models[0].logits(IDS).tobytes() == expected)
        models.clear()  # ends its threads
        return True

    in_child(grandchild)
    in_child(lambda: models.clear() is None)


def test_a_lock_that_a_thread_holds_is_no_one_s_in_a_child(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inside, go_on = threading.Event(), threading.Event()
    check = CompressedModel.check_checksum

    def slow(model: CompressedModel, name: str) -> None:
        if threading.current_thread().name == "entrollm-prepare":
            inside.set()
            go_on.wait()
        check(model, name)

    monkeypatch.setattr(CompressedModel, "check_checksum", slow)
    model = load(folder, threads=2, memory="file")
    inside.wait()
    try:
        in_child(lambda: len(model.logits(IDS)) == len(IDS))
    finally:
        go_on.set()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits of memory differ elsewhere")
def test_memory_that_runs_out_is_a_memory_error(folder: Path) -> None:
    import resource

    name = "model.layers.1.mlp.down_proj.weight"
    with CompressedModel.open(folder) as model:
        matrix = matrix_of(model, name)
    pool = _core.ThreadPool(2)
    rows = np.zeros(1 << 18, np.int64)
    one = matrix.dequantize(rows[:1], pool)

    def body() -> bool:
        resource.setrlimit(resource.RLIMIT_DATA, (1 << 29, 1 << 29))
        with pytest.raises(MemoryError):
            matrix.dequantize(rows, pool)  # 1 GiB
        return np.array_equal(matrix.dequantize(rows[:1], pool), one)

    in_child(body)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits of memory differ elsewhere")
@pytest.mark.parametrize("memory", ["file", "fast"])
def test_a_command_needs_little_more_memory_than_its_coded_weights(folder: Path, memory: Memory) -> None:
    """The libraries that it imports and the scratch of one thread fit in 150 MB."""
    import resource

    limit = sum(file.stat().st_size for file in folder.glob("*.safetensors")) + 150_000_000
    options = ["-p", "The king", "-n", "8", "--threads", "1", "--memory", memory]
    ended = subprocess.run(
        [sys.executable, "-m", "entrollm", "run", folder, *options],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, "OPENBLAS_NUM_THREADS": "1"},  # each of its threads takes memory of its own
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_DATA, (limit, limit)),
    )
    assert ended.returncode == 0 and "8 tokens at" in ended.stderr, ended.stderr
