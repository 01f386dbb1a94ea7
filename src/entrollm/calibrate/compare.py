"""How far compressed models are from their original, computed on the device that calibrates."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from entrollm.arrays import HOST, Device
from entrollm.calibrate.scales import MovingScales
from entrollm.calibrate.store import Spool
from entrollm.calibrate.student import Student
from entrollm.checkpoint.model_folder import Checkpoint
from entrollm.checkpoint.resolve import resolve
from entrollm.format.reader import CompressedModel
from entrollm.processes import share
from entrollm.system import scratch_folder
from entrollm.torch.device import TorchDevice


def compare(
    model: str | Path,
    folder: Path,
    windows: NDArray[np.int64],
    device: Device = HOST,
    threads: int | None = None,
) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """Compare the predictions of a compressed model with its original's, a layer at a time.

    Memory: that of `Student`, and 12 bytes x vocabulary for each prediction of a batch of windows. On disk: 4 bytes x
    vocabulary for each prediction.

    Args:
        model: the checkpoint, a folder or a Hub id.
        folder: what was made of it.
        windows: token ids, shape (windows, tokens).
        device: what computes; processes that share it compare a part of the windows each.
        threads: to decode on; None for one per core.
    Returns:
        The KL divergence of each prediction in nats, and whether both models have the same likeliest token, both of
        shape (windows, tokens - 1): what follows the last token of a window is not in the text.
    Raises:
        EntroLLMError: a divergence is not finite.
        FormatError: a tensor is missing or has the wrong shape.
        UnsupportedError: the layers that run depend on the text.
    """
    windows = windows[:, :-1]
    divergences, agreements = np.zeros(windows.shape), np.zeros(windows.shape)
    own = share(np.arange(len(windows)), device.group)
    place = device if isinstance(device, TorchDevice) else TorchDevice("cpu")
    with (
        Checkpoint.open(resolve(model)) as checkpoint,
        CompressedModel.open(folder) as compressed,
        scratch_folder("entrollm-comparison-") as scratch,
    ):
        student = Student(checkpoint, MovingScales(compressed, threads), Spool(scratch, place), place)
        if len(own):
            divergences[own], agreements[own] = student.compare(windows[own])
    for found in (divergences, agreements):
        device.group.sum(found)
    return divergences, agreements > 0
