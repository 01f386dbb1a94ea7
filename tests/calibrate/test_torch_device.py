"""Calibration on a device of torch gives what it gives on the host, and feedback what it gives in NumPy."""

import functools
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from entrollm.arrays import HOST, Device, solve_positive
from entrollm.calibrate import measure, sample_windows
from entrollm.calibrate.room import Room
from entrollm.calibrate.store import Spool, StoredStatistics
from entrollm.checkpoint.model_folder import Checkpoint
from entrollm.cli.console import describe_error
from entrollm.codec.choose import choose_code
from entrollm.codec.huffman import entropy_bits
from entrollm.compress import CodingOptions, Target, compress_folder
from entrollm.errors import EntroLLMError, FormatError, UnsupportedError
from entrollm.quantize.feedback import FeedbackQuantizer
from entrollm.quantize.gptq import GptqQuantizer
from entrollm.quantize.method import ArraySource, Quantized
from entrollm.quantize.rounding import ZERO, Rounding, to_integers
from entrollm.quantize.statistics import Sensitivity, damped_factor
from entrollm.quantize.trellis import TRELLIS_ZERO
from entrollm.quantize.trellis import Path as TrellisPath
from entrollm.torch.device import TorchDevice
from tests.engine.architectures import ARCHITECTURES, VOCAB_SIZE
from tests.support.matrices import scale_values

NAMES = ("phi3-partial", "qwen3-window")


# The GPU as well where there is one.
KINDS = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module", params=KINDS)
def device(request: pytest.FixtureRequest) -> TorchDevice:
    return TorchDevice(request.param)


def measured(folder: Path, statistics: Path, device: Device) -> StoredStatistics:
    statistics.mkdir()
    windows = np.random.default_rng(4).integers(0, VOCAB_SIZE, (9, 40))
    with Checkpoint.open(folder) as checkpoint:
        return measure(checkpoint, windows, statistics, device=device)


@pytest.mark.parametrize("name", NAMES)
def test_statistics_are_those_of_the_host(name: str, device: TorchDevice, tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    folder = ARCHITECTURES[name](tmp_path / "model")
    expected = measured(folder, tmp_path / "numpy", HOST)
    found = measured(folder, tmp_path / "torch", device)
    assert found.fingerprint == expected.fingerprint
    with Checkpoint.open(folder) as checkpoint:
        matrices = [key for key, info in checkpoint.tensors.items() if len(info.shape) == 2]
    # GPUs round what gradients are made of to three digits.
    close = 1e-4 if device.place.type == "cpu" else 1e-3
    for key in matrices:
        ours, theirs = found.factor(key), expected.factor(key)
        assert isinstance(ours, torch.Tensor)
        np.testing.assert_allclose(ours.cpu(), theirs, atol=close * float(np.abs(theirs).max()), err_msg=key)
        one, other = found.sensitivity(key), expected.sensitivity(key)
        assert one is not None
        assert other is not None
        assert one.share == pytest.approx(other.share, rel=10 * close)
        if other.row_weights is not None:
            np.testing.assert_allclose(one.row_weights, other.row_weights, rtol=10 * close)


@pytest.mark.parametrize("name", ["mistral-window", "phi3-longrope"])
def test_a_model_writes_the_same_text(name: str, device: TorchDevice, tmp_path: Path) -> None:
    folder = ARCHITECTURES[name](tmp_path)
    with Checkpoint.open(folder) as checkpoint:
        host, other = (sample_windows(checkpoint, (5, 40), 3, device=place) for place in (HOST, device))
    # A draw on the edge between two tokens may fall either way, and changes what follows.
    assert (host == other).all(axis=1).sum() >= 4


def correlated(columns: int) -> NDArray[np.float32]:
    generator = np.random.default_rng(2)
    x = generator.standard_normal((3 * columns, columns)) @ generator.standard_normal((columns, columns))
    return damped_factor(x.T @ x)


@pytest.mark.parametrize("has_zeros", [True, False], ids=["a row of zeros", "none"])
@pytest.mark.parametrize("method", [FeedbackQuantizer, GptqQuantizer])
def test_integers_are_those_of_numpy(
    method: type[FeedbackQuantizer] | type[GptqQuantizer], has_zeros: bool, device: TorchDevice
) -> None:
    weights = np.random.default_rng(3).standard_normal((200, 150)).astype(np.float32)
    weights[7] *= not has_zeros
    precision = np.linspace(0.7, 1.4, 200, dtype=np.float32)
    choose = functools.partial(choose_code, blocks=8)

    def run(place: Device) -> Quantized:
        quantizer = method(0.5, place.put(correlated(150)), precision, device=place)
        return quantizer.quantize(ArraySource("w", weights), choose)

    host, other = run(HOST), run(device)
    assert (host.symbols != other.symbols).mean() < 1e-3
    # A code may be the next one where a fit lies in the middle between two.
    np.testing.assert_allclose(scale_values(other.scale), scale_values(host.scale), rtol=0.05)
    assert other.error == pytest.approx(host.error, rel=1e-3)
    assert other.energy == pytest.approx(host.energy, rel=1e-6)


def test_a_model_calibrated_in_torch_meets_its_size(device: TorchDevice, tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    folder = ARCHITECTURES["llama"](tmp_path / "model")
    statistics = measured(folder, tmp_path / "statistics", device)
    options = CodingOptions(target=Target(bits_per_weight=5.0), threads=1)
    result = compress_folder(folder, tmp_path / "out", options, statistics=statistics)
    assert result.file_bits == pytest.approx(5.0, rel=0.005)


def test_the_paths_of_a_trellis_are_those_of_the_host(device: TorchDevice) -> None:
    generator = np.random.default_rng(5)
    rows, columns = 9, 130
    left = (3 * generator.standard_normal((columns, rows))).astype(np.float32)
    reach = np.tril(generator.standard_normal((columns, columns)) / 8, -1).astype(np.float32)
    costs, prices = (generator.uniform(0.5, 2, n).astype(np.float32) for n in (columns, 2 * TRELLIS_ZERO))
    places: list[Device] = [HOST, device]
    paths = [TrellisPath(prices, place.put(costs), place.put(left), place) for place in places]
    for end in range(columns, 0, -64):
        first = paths[0].first(end)
        found = [
            place.take(path.round(place.put(left), place.put(reach[first:end, first:end]), end))
            for place, path in zip(places, paths, strict=True)
        ]
        np.testing.assert_array_equal(*found)


def test_weights_that_are_not_finite_are_named(device: TorchDevice) -> None:
    weights = np.zeros((4, 20), np.float32)
    weights[2, 3] = np.inf
    quantizer = FeedbackQuantizer(0.5, device.put(np.eye(20, dtype=np.float32)), device=device)
    with pytest.raises(FormatError, match=r"tensor 'w' has inf at \[2, 3\]; weights must be finite"):
        quantizer.quantize(ArraySource("w", weights), functools.partial(choose_code, blocks=1))


def test_a_model_that_does_not_fit_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = ARCHITECTURES["llama"](tmp_path)
    device = TorchDevice("cpu")
    monkeypatch.setattr(device, "memory", lambda: 10**9)
    with (
        Checkpoint.open(folder) as checkpoint,
        pytest.raises(EntroLLMError, match=r"needs 1.1 GB of memory, and this machine has 1.0 GB; .* sampled=0"),
    ):
        sample_windows(checkpoint, (1, 2), device=device)


def test_a_torch_without_cuda_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", None)
    message = "is built without CUDA; install one that is made for your GPU, or calibrate on the processor, with "
    with pytest.raises(UnsupportedError, match=message + "device='cpu'") as raised:
        TorchDevice("cuda")
    assert describe_error(raised.value).endswith(message + "--device cpu")


def test_a_missing_gpu_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    message = "finds no GPU; check the driver with nvidia-smi, or calibrate on the processor, with "
    with pytest.raises(UnsupportedError, match=message + "device='cpu'") as raised:
        TorchDevice("cuda")
    assert describe_error(raised.value).endswith(message + "--device cpu")


def test_a_gpu_whose_memory_is_full_is_named(device: TorchDevice) -> None:
    message = r"too little memory; use device='cpu' \(Tried to allocate"
    with pytest.raises(EntroLLMError, match=message) as raised, device.guard():
        raise torch.OutOfMemoryError("Tried to allocate 1 TiB")
    assert describe_error(raised.value).endswith("too little memory; use --device cpu (Tried to allocate 1 TiB)")


@given(st.lists(st.floats(-300, 300, width=32), min_size=1, max_size=40), st.floats(0, 0.3))
def test_numbers_round_to_the_same_integers(device: TorchDevice, numbers: list[float], price: float) -> None:
    lengths = np.abs(np.arange(256) - ZERO) * 0.7 + 1
    rounding = Rounding(lengths, price)
    scaled = np.array(numbers, np.float32)
    scaled = scaled[2 * scaled != np.floor(2 * scaled)]  # integers and halves may lie on a threshold
    expected = rounding.symbols(scaled).astype(np.float32) - ZERO
    np.testing.assert_array_equal(to_integers(scaled, rounding.thresholds), expected)
    found = to_integers(device.put(scaled), device.put(rounding.thresholds))
    np.testing.assert_array_equal(found.cpu(), expected)


@pytest.mark.parametrize("size", [1, 256, 600])
def test_a_stored_triangle_comes_back(
    size: int, device: TorchDevice, checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    triangle = np.tril(np.random.default_rng(size).standard_normal((size, size)).astype(np.float32))
    for place in (HOST, device):
        statistics = StoredStatistics(tmp_path, np.zeros((1, 8), np.int64), place)
        statistics.add("w", place.put(triangle), Sensitivity(1.0))
        np.testing.assert_array_equal(place.take(statistics.factor("w")), triangle)
        spool = Spool(tmp_path, place)
        spool.put_triangle("m", place.put(triangle + triangle.T))
        np.testing.assert_array_equal(
            np.tril(place.take(spool.take_triangle("m", size))), np.tril(triangle + triangle.T)
        )
    # Half of a large square.
    assert (tmp_path / "factor-0").stat().st_size <= 4 * size * (size + 255) // 2 + 4 * size
    assert [path.name for path in tmp_path.iterdir()] == ["factor-0"]


def test_arrays_wait_on_the_device_while_there_is_room(device: TorchDevice, tmp_path: Path) -> None:
    first, second = (device.put(np.full((3, 5), value, np.float32)) for value in (1, 2))
    spool = Spool(tmp_path, device, Room(100))
    spool.put("first", first)
    spool.put("second", second)
    assert [path.name for path in tmp_path.iterdir()] == ["spool-second"]
    first += 7  # what waits is a copy
    assert spool.take("first").tolist() == [[1.0] * 5] * 3
    spool.put("third", second)
    assert [path.name for path in tmp_path.iterdir()] == ["spool-second"]
    assert spool.take("second").tolist() == spool.take("third").tolist() == [[2.0] * 5] * 3


def test_statistics_wait_on_a_device_with_memory_to_spare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "model").mkdir()
    folder = ARCHITECTURES["llama"](tmp_path / "model")
    device = TorchDevice("cpu")
    expected = measured(folder, tmp_path / "files", device)
    assert any((tmp_path / "files").iterdir())
    device.spare = 0.5
    found = measured(folder, tmp_path / "device", device)
    assert not any((tmp_path / "device").iterdir())
    for key in expected.order:
        assert torch.equal(found.factor(key), expected.factor(key))
    monkeypatch.setattr(device, "memory", lambda: 1 << 10)  # not even what calibration needs
    measured(folder, tmp_path / "small", device)
    assert any((tmp_path / "small").iterdir())


def test_positive_systems_are_solved_as_in_numpy() -> None:
    x = np.random.default_rng(0).standard_normal((40, 20))
    matrix, values = x.T @ x, x[0]
    expected = np.linalg.solve(matrix, values)
    np.testing.assert_allclose(solve_positive(matrix, values), expected, rtol=1e-9)
    found = solve_positive(torch.from_numpy(matrix), torch.from_numpy(values))
    np.testing.assert_allclose(found, expected, rtol=1e-9)
    # A matrix that is not positive definite, by rounding, is solved too.
    matrix -= 1.01 * np.linalg.eigvalsh(matrix)[0] * np.eye(20)
    found = solve_positive(torch.from_numpy(matrix), torch.from_numpy(values))
    np.testing.assert_allclose(found, np.linalg.solve(matrix, values), rtol=1e-6)


@pytest.mark.parametrize("step", [0.3, 0.9])
def test_a_draft_has_about_the_histogram_of_the_matrix(step: float) -> None:
    weights = np.random.default_rng(3).standard_normal((96, 150)).astype(np.float32)
    choose = functools.partial(choose_code, blocks=8)
    bits = []
    for is_draft in (False, True):
        quantizer = FeedbackQuantizer(step, correlated(150), is_draft=is_draft)
        quantized = quantizer.quantize(ArraySource("w", weights), choose)
        bits.append(entropy_bits([int(c) for c in quantized.counts]))
    assert bits[1] == pytest.approx(bits[0], abs=0.02)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_is_named(tmp_path: Path) -> None:
    full = tmp_path / "spool-a"
    full.symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left on device") as caught:
        Spool(tmp_path, HOST).put("a", np.ones((300, 100), np.float32))
    assert caught.value.filename == str(full)
    spool = Spool(tmp_path, HOST)
    array = np.arange(6.0).reshape(2, 3).T
    spool.put("b", array)
    np.testing.assert_array_equal(spool.take("b"), array)
