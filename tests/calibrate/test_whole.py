"""Models that are measured as a whole: against walks and autograd, within a memory, corrected and compressed."""

import functools
import itertools
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from entrollm.calibrate import StoredStatistics, compare, measure
from entrollm.calibrate.drift import DriftWalk
from entrollm.calibrate.network import Network
from entrollm.calibrate.survey import load_whole
from entrollm.calibrate.watch import Watch
from entrollm.calibrate.whole import measure_whole
from entrollm.checkpoint.model_folder import Checkpoint
from entrollm.compress import CodingOptions, Target, compress_folder
from entrollm.errors import EntroLLMError
from entrollm.torch.device import TorchDevice
from tests.calibrate.test_drift import closed_form, few_tokens, noisy_copy
from tests.calibrate.test_walk import AS_A_WHOLE, OF_THE_ENGINE, WINDOWS, save_model

CPU = TorchDevice("cpu")
MANY_WINDOWS = np.random.default_rng(6).integers(0, 211, (70, 8))


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {name: save_model(name, tmp_path_factory.mktemp(name)) for name in (*AS_A_WHOLE, "gpt_oss")}


def whole(checkpoint: Checkpoint, folder: Path, windows: NDArray[np.int64]) -> StoredStatistics:
    folder.mkdir()
    stored = StoredStatistics(folder, windows)
    measure_whole(checkpoint, windows, stored, CPU)
    return stored


def walked(checkpoint: Checkpoint, folder: Path, windows: NDArray[np.int64]) -> StoredStatistics:
    folder.mkdir()
    return measure(checkpoint, windows, folder)


def assert_equal(found: StoredStatistics, expected: StoredStatistics, rel: float, but: str = "nothing") -> None:
    # A walk sees look-ups inside of layers only on the way back.
    order = [name for name in found.order if "relative_attention_bias" not in name]
    assert order == list(expected.order)
    for name in found.order:
        if but in name:
            continue
        one, other = found.sensitivity(name), expected.sensitivity(name)
        assert one is not None
        assert other is not None
        assert one.share == pytest.approx(other.share, rel=rel), name
        if one.row_weights is None or other.row_weights is None:
            assert one.row_weights is other.row_weights
        else:
            np.testing.assert_allclose(one.row_weights, other.row_weights, rtol=rel)
        factors = [statistics.factor(name) for statistics in (found, expected)]
        moments, wanted = (factor @ factor.T for factor in factors)
        np.testing.assert_allclose(moments, wanted, atol=rel * np.abs(wanted).max(), err_msg=name)


@pytest.mark.parametrize(
    "name", ["llama-tied", "qwen3-window", "gemma2", "gemma4_unified", "gpt2", "t5", "gpt_oss", "qwen3_next"]
)
def test_statistics_are_those_of_a_walk(name: str, tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    # More windows than gradients are taken of, for one of the models.
    windows = MANY_WINDOWS if name == "llama-tied" else MANY_WINDOWS[:5]
    with Checkpoint.open(save_model(name, tmp_path / "model")) as checkpoint:
        found = whole(checkpoint, tmp_path / "whole", windows)
        expected = walked(checkpoint, tmp_path / "walked", windows)
    assert_equal(found, expected, 1e-4)
    assert found.streams == expected.streams
    assert {path.name.split("-")[0] for path in (tmp_path / "whole").iterdir()} == {"factor"}


@pytest.mark.parametrize("name", AS_A_WHOLE)
def test_a_walk_leaves_nothing_behind(name: str, models: dict[str, Path], tmp_path: Path) -> None:
    with Checkpoint.open(models[name]) as checkpoint:
        expected = whole(checkpoint, tmp_path / "whole", WINDOWS)
        found = walked(checkpoint, tmp_path / "walked", WINDOWS)
    assert_equal(found, expected, 1e-6)
    files = [sorted(path.name for path in (tmp_path / kind).iterdir()) for kind in ("whole", "walked")]
    assert files[0] == files[1]


@pytest.mark.parametrize("name", ["albert", "gpt_oss"])
def test_a_small_memory_takes_more_passes(
    name: str, models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    windows = WINDOWS[: 1 if name == "gpt_oss" else 3]  # tokens of experts come from all windows of a batch
    steps: list[float] = []
    with Checkpoint.open(models[name]) as checkpoint:
        expected = whole(checkpoint, tmp_path / "whole", windows)
        _, survey, memory = load_whole(checkpoint, windows, CPU, "")
        needed = CPU.memory() - memory.left + max(survey.sums.values())
        monkeypatch.setattr(TorchDevice, "memory", lambda self: needed)
        (tmp_path / "small").mkdir()
        found = StoredStatistics(tmp_path / "small", windows)
        measure_whole(checkpoint, windows, found, CPU, lambda done, total: steps.append(total))
    assert_equal(found, expected, 1e-4, but="position_embeddings")  # which have one sum over a batch
    assert len(steps) == steps[-1] >= 2 * len(windows)  # several passes, of one window at a time


@pytest.mark.parametrize("name", [*OF_THE_ENGINE, "t5"])
def test_what_can_be_walked_is(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, why: str, **__: object) -> None:
        pytest.fail(why)

    monkeypatch.setattr(sys.modules["entrollm.calibrate.measure"], "measure_whole", refuse)
    (tmp_path / "model").mkdir()
    with Checkpoint.open(save_model(name, tmp_path / "model")) as checkpoint:
        assert walked(checkpoint, tmp_path / "statistics", WINDOWS[:1]).order


def test_batches_that_go_different_ways_are_measured_and_not_corrected(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    call, calls = LlamaDecoderLayer.__call__, itertools.count()

    def skip(layer: LlamaDecoderLayer, x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """Leave out the second layer every other time."""
        is_left_out = layer.self_attn.layer_idx == 1 and next(calls) % 2
        return x if is_left_out else call(layer, x, *args, **kwargs)

    (tmp_path / "model").mkdir()
    model = save_model("llama-tied", tmp_path / "model")
    monkeypatch.setattr(LlamaDecoderLayer, "__call__", skip)
    with Checkpoint.open(model) as checkpoint:
        statistics = walked(checkpoint, tmp_path / "statistics", MANY_WINDOWS[:16])
    assert statistics.order
    assert not statistics.streams


def test_a_model_that_does_not_fit_is_named(
    models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    message = (
        r"albert\S*: calibration cannot take one layer after another \(albert.encoder.albert_layer_groups.0: the model "
        r"runs it more than once\), and all layers at once need at least 0.0 GB of memory, where this machine has 0.0 "
        r"GB; compress it without "
    )
    with Checkpoint.open(models["albert"]) as checkpoint:
        weights = 4 * Network(checkpoint, CPU).weights()
        for memory, tunes in ((weights - 1, False), (weights + 1000, False), (2 * weights - 1, True)):
            monkeypatch.setattr(TorchDevice, "memory", lambda self, memory=memory: memory)
            with pytest.raises(EntroLLMError, match=message + ("tune$" if tunes else "calibration$")):
                measure(checkpoint, WINDOWS, tmp_path, tunes=tunes)
            assert not list(tmp_path.iterdir())


def seen(folder: Path) -> dict[str, NDArray[np.float32]]:
    """What each matrix reads over all tokens; of those that are multiplied with several times, the last time."""
    with Checkpoint.open(folder) as checkpoint:
        network = Network(checkpoint, CPU)
        network.load_all()
    read: dict[str, NDArray[np.float32]] = {}

    class Reader:
        def product(self, matrix, x, is_transposed, multiply):  # type: ignore[no-untyped-def]
            read[matrix.pieces[0].name] = x.reshape(-1, x.shape[-1]).numpy()
            return multiply()

        def look_up(self, *_: object) -> None: ...

        def add(self, *_: object) -> None: ...

    with torch.no_grad(), Watch(network, Reader()):
        network.model(torch.from_numpy(WINDOWS))
    return read


@pytest.mark.parametrize("name", AS_A_WHOLE)
def test_corrections_are_those_of_the_closed_form(name: str, models: dict[str, Path], tmp_path: Path) -> None:
    noisy = noisy_copy(models[name], tmp_path / "noisy")
    original, drifted = seen(models[name]), seen(noisy)
    compared = 0
    with Checkpoint.open(models[name]) as source, Checkpoint.open(noisy) as changed:
        statistics = walked(source, tmp_path / "statistics", WINDOWS)
        walk = DriftWalk(source, WINDOWS, statistics.streams, repeated=statistics.repeated)
        for matrix in statistics.order:
            correction = walk.correction(matrix)
            walk.record(matrix, functools.partial(changed.read_float32, matrix))
            if correction is None or statistics.streams[matrix] is not None:
                continue
            expected = closed_form(source.read_float32(matrix), (original[matrix], None), (drifted[matrix], None))
            np.testing.assert_allclose(correction, expected, atol=2e-3 * np.abs(expected).max() + 1e-7, err_msg=matrix)
            compared += bool(expected.any())
    assert compared >= (1 if name == "albert" else 6)
    assert not set(statistics.repeated) & set(statistics.streams)


def test_calibration_brings_such_a_model_closer(models: dict[str, Path], tmp_path: Path) -> None:
    model = models["zamba2"]
    with Checkpoint.open(model) as checkpoint:
        statistics = walked(checkpoint, tmp_path / "statistics", few_tokens(4)[:8])
    found = {}
    for kind in ("without", "calibrated"):
        options = CodingOptions(target=Target(bits_per_weight=7.0), threads=1)
        result = compress_folder(model, tmp_path / kind, options, statistics=None if kind == "without" else statistics)
        divergences, _ = compare(model, tmp_path / kind, few_tokens(5)[:8])
        # A bit is worth a factor of 4.
        found[kind] = float(divergences.mean()) * 4 ** (result.file_bits - 7)
    assert found["calibrated"] < 0.5 * found["without"]
