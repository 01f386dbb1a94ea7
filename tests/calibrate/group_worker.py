"""What `test_group.py` has one process do, and two of them that torchrun starts."""

import functools
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
from entrollm.compress import CodingOptions, Target, compress_folder
from tests.engine.architectures import VOCAB_SIZE

# In two batches of 8, one for each process. The first one repeats a token, so that it needs two experts.
WINDOWS = np.random.default_rng(4).integers(0, VOCAB_SIZE, (16, 24))
WINDOWS[:8] = 7
HELD_OUT = np.random.default_rng(5).integers(0, VOCAB_SIZE, (3, 24))


def work(model: Path, folder: Path, device: Device) -> dict[str, Any]:
    """Write, measure, correct, tune and compare; what the first process, or the only one, has found."""
    folder.mkdir()
    group = device.group
    with Checkpoint.open(model) as checkpoint:
        written = sample_windows(checkpoint, (5, 16), device=device)
        statistics = measure(checkpoint, WINDOWS, folder, device=device)
    made = folder / "made"
    tuner = Tuner(model, WINDOWS[:7], HELD_OUT, device, threads=1)
    compared = functools.partial(compare, model, windows=HELD_OUT, device=device, threads=1)
    if group.rank:
        follow(model, statistics, {"tune": tuner, "compare": compared})
        return {"written": written}
    corrections = correct(model, statistics)
    options = CodingOptions(target=Target(coded_bits=3.0), fine_scales=True, threads=1)
    compress_folder(model, made, options)
    group.from_first(("tune", str(made)))
    tuner(made)
    group.from_first(("compare", str(made)))
    divergences, _ = compared(made)
    group.from_first(None)
    assert tuner.result is not None
    sensitivities = {name: statistics.sensitivity(name) for name in statistics.order}
    return {
        "written": written,
        "factors": {name: statistics.factor(name) for name in statistics.order},
        "shares": {name: found.share for name, found in sensitivities.items() if found is not None},
        "rows": {name: found.row_weights for name, found in sensitivities.items() if found is not None},
        "streams": statistics.streams,
        "corrections": corrections,
        "tuned": (tuner.result.kl_before, tuner.result.kl_after),
        "divergences": divergences,
    }


def correct(model: Path, statistics: StoredStatistics) -> dict[str, Any]:
    """What drift adds to each matrix where all have noise."""
    generator = np.random.default_rng(1)
    found = {}
    with Checkpoint.open(model) as checkpoint:
        walk = statistics.drift(checkpoint)
        for name in statistics.order:
            found[name] = walk.correction(name)
            weight = checkpoint.read_float32(name)
            noisy = weight + 0.1 * weight.std() * generator.standard_normal(weight.shape, np.float32)
            walk.record(name, lambda noisy=noisy: noisy)
    return found


def main(out: Path, *models: Path) -> None:
    """Do the work on each model in a group, and leave what was found in `out`."""
    from entrollm.torch.group import TorchGroup

    products._HAS_BFLOAT16 = False
    group = TorchGroup("cpu")
    group.open()
    torch.set_num_threads(1)
    found = [work(model, out / f"{model.name}-{group.rank}", shared_host(group)) for model in models]
    everyone = group.gather([each["written"] for each in found])
    assert all((texts == texts[0]).all() for texts in zip(*everyone, strict=True))
    if group.rank == 0:
        (out / "found.pickle").write_bytes(pickle.dumps(found))
    group.close()


def fail() -> None:
    """End one process while the other waits for it."""
    from entrollm.cli.processes import shared_by_torchrun

    with shared_by_torchrun("cpu") as group:
        group.sum(np.zeros(3))
        if group.rank == 1:
            raise ValueError("this process has failed")
        group.sum(np.zeros(3))


if __name__ == "__main__":
    if sys.argv[1] == "fail":
        fail()
    else:
        main(*map(Path, sys.argv[1:]))
