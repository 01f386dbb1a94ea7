"""What `test_group.py` has one process do, and two of them that torchrun starts."""

import pickle
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

from entrollm.arrays import Device, shared_host
from entrollm.calibrate import Tuner, compare, follow, measure, products, sample_windows
from entrollm.calibrate.store import StoredStatistics
from entrollm.checkpoint.model_folder import Checkpoint
from entrollm.cli.processes import shared_by_torchrun
from entrollm.processes import Group
from entrollm.torch.device import TorchDevice
from entrollm.torch.group import TorchGroup
from tests.calibrate.test_walk import AS_A_WHOLE, VOCABULARY
from tests.engine.architectures import VOCAB_SIZE

# In two batches of 8, one for each process. The first one repeats a token, so that it needs two experts.
WINDOWS = np.random.default_rng(4).integers(0, VOCABULARY, (16, 24))
WINDOWS[:8] = 7
HELD_OUT = np.random.default_rng(5).integers(0, VOCAB_SIZE, (3, 24))


def work(model: Path, folder: Path, device: Device) -> dict[str, Any]:
    """Write, measure and correct; what the first process, or the only one, has found."""
    folder.mkdir()
    with Checkpoint.open(model) as checkpoint:
        is_writer = checkpoint.config["model_type"] not in AS_A_WHOLE
        written = sample_windows(checkpoint, (5, 16), device=device) if is_writer else np.zeros((0, 16), np.int64)
        statistics = measure(checkpoint, WINDOWS, folder, device=device)
    if device.group.rank:
        follow(model, statistics)
        return {"written": written}
    corrections = correct(model, statistics)
    device.group.from_first(None)
    sensitivities = {name: statistics.sensitivity(name) for name in statistics.order}
    return {
        "written": written,
        "factors": {name: device.take(statistics.factor(name)) for name in statistics.order},
        "shares": {name: found.share for name, found in sensitivities.items() if found is not None},
        "rows": {name: found.row_weights for name, found in sensitivities.items() if found is not None},
        "streams": statistics.streams,
        "corrections": corrections,
    }


def fit(model: Path, made: Path, device: Device) -> dict[str, Any]:
    """Tune what was made of a model, and compare it."""
    tuner = Tuner(model, WINDOWS[8:15], HELD_OUT, device, threads=1)
    tuner(made)
    assert tuner.result is not None
    divergences, _ = compare(model, made, HELD_OUT, device, threads=1)
    return {"tuned": (tuner.result.kl_before, tuner.result.kl_after), "divergences": divergences}


def correct(model: Path, statistics: StoredStatistics) -> dict[str, Any]:
    """What drift adds to each matrix where all have noise."""
    generator = np.random.default_rng(1)
    found = {}
    with Checkpoint.open(model) as checkpoint:
        walk = statistics.drift(checkpoint)
        for name in statistics.order:
            correction = walk.correction(name)
            found[name] = None if correction is None else statistics.device.take(correction)
            weight = checkpoint.read_float32(name)
            noisy = weight + 0.1 * weight.std() * generator.standard_normal(weight.shape, np.float32)
            walk.record(name, lambda noisy=noisy: noisy)
    return found


def device_of(kind: str, group: Group) -> Device:
    """What a group computes on."""
    return TorchDevice(kind, group) if kind == "cuda" else shared_host(group)


def main(kind: str, out: Path, made: Path, *models: Path) -> None:
    """Do the work on each model in a group, fit `made` to the last one, and leave what was found in `out`."""
    products._HAS_BFLOAT16 = False
    group = TorchGroup(kind)
    group.open()
    torch.set_num_threads(1)
    device = device_of(kind, group)
    found = [work(model, out / f"{model.name}-{group.rank}", device) for model in models]
    everyone = group.gather([each["written"] for each in found])
    assert all((texts == texts[0]).all() for texts in zip(*everyone, strict=True))
    found.append(fit(models[-1], made, device))
    if group.rank == 0:
        (out / "found.pickle").write_bytes(pickle.dumps(found))
    group.close()


def fail() -> None:
    """End one process while the other waits for it."""
    with shared_by_torchrun("cpu") as group:
        group.sum(np.zeros(3))
        if group.rank == 1:
            raise ValueError("this process has failed")
        group.sum(np.zeros(3))


if __name__ == "__main__":
    if sys.argv[1] == "fail":
        fail()
    else:
        main(sys.argv[1], *map(Path, sys.argv[2:]))
