"""Drift: what is added to matrices whose inputs come from quantized ones, against its closed form."""

import functools
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file

from entrollm.arrays import HOST, Device
from entrollm.calibrate import measure
from entrollm.calibrate.drift import DriftWalk
from entrollm.calibrate.store import StoredStatistics
from entrollm.checkpoint.model_folder import Checkpoint
from entrollm.compress import CodingOptions, Target, compress_folder
from entrollm.compress.progress import CompressProgress
from entrollm.engine.load import load
from entrollm.errors import EntroLLMError
from entrollm.evaluate.divergence import token_divergences
from entrollm.format.reader import CompressedModel
from entrollm.quantize.select import BitsOverride
from entrollm.torch.device import TorchDevice
from tests.engine.architectures import VOCAB_SIZE, load_reference

Floats = NDArray[np.float32]
# Between them: a tied head and one of its own, biases, fused matrices, a window, norms of queries and keys.
NAMES = ("llama-tied", "phi3-partial", "qwen3-window")
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
STREAMS = {
    f"model.layers.{layer}.{name}_proj.weight": None
    for layer in range(2)
    for name in ("self_attn.q", "self_attn.k", "self_attn.v", "self_attn.o", "mlp.gate", "mlp.up", "mlp.down")
}
WINDOWS = np.random.default_rng(4).integers(0, VOCAB_SIZE, (24, 40))


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def noisy_copy(folder: Path, out: Path) -> Path:
    """The model with noise on every matrix."""
    shutil.copytree(folder, out)
    torch.manual_seed(1)
    for file in sorted(out.glob("*.safetensors")):
        tensors = load_file(file)
        noise = {k: t + 0.1 * t.float().std() * torch.randn(t.shape) for k, t in tensors.items() if t.dim() == 2}
        save_file(tensors | {k: t.to(torch.bfloat16) for k, t in noise.items()}, file)
    return out


def seen(folder: Path) -> dict[str, tuple[Floats, Floats | None]]:
    """What each matrix reads, and what is waiting for its outputs, over all tokens."""
    model = load_reference(folder).float()
    read: dict[str, Floats] = {}
    given: dict[str, Floats] = {}

    def rows(x: torch.Tensor) -> Floats:
        return x.detach().reshape(-1, x.shape[-1]).numpy()

    def watch(module: torch.nn.Module, name: str) -> None:
        def see(_: torch.nn.Module, args: tuple[torch.Tensor, ...], y: Any) -> None:
            read[name], given[name] = rows(args[0]), rows(y[0] if isinstance(y, tuple) else y)

        module.register_forward_hook(see)

    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) or re.fullmatch(r"model\.layers\.\d+", name):
            watch(module, name)
    with torch.no_grad():
        model(torch.from_numpy(WINDOWS))
    found: dict[str, tuple[Floats, Floats | None]] = {}
    for name in [name for name in read if not name.rpartition(".")[2].isdigit()]:
        layer = name.split(".self_attn")[0].split(".mlp")[0]
        adds = read[layer] if name.endswith("o_proj") else None
        if name.endswith("down_proj"):
            adds = given[layer] - given[name]
        found[f"{name}.weight"] = read[name], adds
    return found


def closed_form(
    weight: Floats, original: tuple[Floats, Floats | None], drifted: tuple[Floats, Floats | None]
) -> Floats:
    x, y = original[0].astype(np.float64), drifted[0].astype(np.float64)
    moments = y.T @ y
    wanted = weight @ (x - y).T @ y
    if original[1] is not None and drifted[1] is not None:
        wanted += (original[1] - drifted[1]).T @ y
    moments += 0.2 * np.trace(moments) / len(moments) * np.eye(len(moments))
    return (0.6 * wanted @ np.linalg.inv(moments)).astype(np.float32)


def statistics_of(folder: Path, place: Path, windows: NDArray[np.int64] = WINDOWS) -> StoredStatistics:
    place.mkdir()
    with Checkpoint.open(folder) as checkpoint:
        return measure(checkpoint, windows, place)


@pytest.mark.parametrize("device", [HOST, TorchDevice("cpu")], ids=["numpy", "torch"])
@pytest.mark.parametrize("name", NAMES)
def test_corrections_are_those_of_the_closed_form(
    name: str, device: Device, checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = checkpoint(name)
    noisy = noisy_copy(folder, tmp_path / "noisy")
    original, drifted = seen(folder), seen(noisy)
    statistics = statistics_of(folder, tmp_path / "statistics")
    order = statistics.order
    is_tied = json.loads((folder / "config.json").read_text())["tie_word_embeddings"]
    with Checkpoint.open(folder) as source, Checkpoint.open(noisy) as changed:
        walk = DriftWalk(source, WINDOWS, statistics.streams, device)
        for matrix in order:
            correction = walk.correction(matrix)
            if matrix == EMBEDDING:
                assert correction is None
            else:
                expected = closed_form(source.read_float32(matrix), original[matrix], drifted[matrix])
                found = device.take(correction)
                np.testing.assert_allclose(found, expected, atol=2e-3 * np.abs(expected).max(), err_msg=matrix)
            walk.record(matrix, functools.partial(changed.read_float32, matrix))
    matrices = [key for key in original if key != HEAD or not is_tied]
    assert sorted(order) == sorted([EMBEDDING, *matrices])


def test_without_any_drift_nothing_is_corrected(checkpoint: Callable[[str], Path]) -> None:
    folder = checkpoint("llama-tied")
    with Checkpoint.open(folder) as source:
        walk = DriftWalk(source, WINDOWS, STREAMS, HOST)
        assert not walk.correction("model.layers.1.mlp.down_proj.weight").any()


def test_matrices_that_are_asked_for_too_late_are_refused(checkpoint: Callable[[str], Path]) -> None:
    folder = checkpoint("llama-tied")
    with Checkpoint.open(folder) as source:
        walk = DriftWalk(source, WINDOWS, STREAMS, HOST)
        walk.correction("model.layers.1.self_attn.o_proj.weight")
        with pytest.raises(ValueError, match=r"layers.0.mlp.up_proj.weight: .* asked for before"):
            walk.correction("model.layers.0.mlp.up_proj.weight")


def test_matrices_are_read_when_the_walk_passes_them(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    """A resumed run takes note of all that are finished; one layer of them is in memory at a time."""
    folder = checkpoint("llama-tied")
    order = statistics_of(folder, tmp_path / "statistics").order
    found: list[str] = []
    with Checkpoint.open(folder) as source:

        def read(name: str) -> NDArray[np.float32]:
            found.append(name)
            return source.read_float32(name)

        walk = DriftWalk(source, WINDOWS, STREAMS, HOST)
        for name in order:
            walk.record(name, functools.partial(read, name))
        assert not found
        walk.correction("model.layers.0.self_attn.o_proj.weight")
        assert sorted(found) == sorted(order[:4])  # the embedding, q, k and v


def test_dead_inputs_are_not_corrected(checkpoint: Callable[[str], Path]) -> None:
    folder = checkpoint("llama-tied")
    with Checkpoint.open(folder) as source:
        walk = DriftWalk(source, WINDOWS, STREAMS, HOST)
        for part in ("gate", "up"):
            name = f"model.layers.0.mlp.{part}_proj.weight"
            walk.record(name, functools.partial(np.zeros, source.tensors[name].shape, np.float32))
        assert not walk.correction("model.layers.0.mlp.down_proj.weight").any()
        assert np.isfinite(walk.correction("model.layers.1.self_attn.q_proj.weight")).all()


def test_activations_that_are_not_finite_are_named(checkpoint: Callable[[str], Path]) -> None:
    folder = checkpoint("llama-tied")
    with Checkpoint.open(folder) as source:
        walk = DriftWalk(source, WINDOWS, STREAMS, HOST)
        name = "model.layers.1.self_attn.v_proj.weight"
        walk.record(name, lambda: np.full(source.tensors[name].shape, np.nan, np.float32))
        message = r"layers.1.self_attn.o_proj.weight: its inputs in the quantized model are not finite"
        with pytest.raises(EntroLLMError, match=message):
            walk.correction("model.layers.1.self_attn.o_proj.weight")


def few_tokens(seed: int) -> NDArray[np.int64]:
    """Windows whose inputs are correlated, as those of text are."""
    return np.random.default_rng(seed).integers(0, 24, (24, 40))


def divergence(folder: Path, coded: Path) -> float:
    windows = few_tokens(5)
    original, model = load(folder, threads=1), load(coded, threads=1)
    return float(np.mean([token_divergences(original.logits(ids), model.logits(ids)).mean() for ids in windows]))


def test_a_model_is_closer_to_its_original_on_text_it_was_not_calibrated_on(
    checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = checkpoint("qwen3-window")
    statistics = statistics_of(folder, tmp_path / "statistics", few_tokens(4))
    found = {}
    for drift in (True, False):
        options = CodingOptions(target=Target(bits_per_weight=6.0), drift=drift, threads=1)
        result = compress_folder(folder, tmp_path / str(drift), options, statistics=statistics)
        # A bit is worth a factor of 4.
        found[drift] = divergence(folder, tmp_path / str(drift)) * 4 ** (result.file_bits - 6)
    assert found[True] < 0.9 * found[False]


def test_an_interrupted_run_goes_on_with_what_its_matrices_have_become(
    checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = checkpoint("phi3-partial")
    statistics = statistics_of(folder, tmp_path / "statistics")
    overrides = (BitsOverride("*layers.1*o_proj*", None),)
    options = CodingOptions(target=Target(bits_per_weight=6.0), overrides=overrides, shard_bytes=100_000, threads=1)

    def interrupt(progress: CompressProgress) -> None:
        if "layers.2" in progress.tensor:
            raise KeyboardInterrupt

    compress_folder(folder, tmp_path / "whole", options, statistics=statistics)
    with pytest.raises(KeyboardInterrupt):
        compress_folder(folder, tmp_path / "resumed", options, statistics=statistics, on_progress=interrupt)
    result = compress_folder(folder, tmp_path / "resumed", options, statistics=statistics)
    assert result.resumed_weights > 0
    for file in (tmp_path / "whole").iterdir():
        assert file.read_bytes() == (tmp_path / "resumed" / file.name).read_bytes(), file.name
    with CompressedModel.open(tmp_path / "resumed") as model:
        assert "model.layers.1.self_attn.o_proj.weight" in model.plain
