"""Measure what the matrices of a model see of a text: one layer at a time, or the whole model at once."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from entrollm.arrays import HOST, Device
from entrollm.calibrate.joined import tell_unwalkable
from entrollm.calibrate.lockstep import UnwalkableError
from entrollm.calibrate.network import Network
from entrollm.calibrate.room import room_beside
from entrollm.calibrate.store import Spool, StoredStatistics
from entrollm.calibrate.walk import Progress, walk
from entrollm.calibrate.whole import measure_whole
from entrollm.checkpoint.model_folder import Checkpoint
from entrollm.torch.device import TorchDevice


def measure(
    checkpoint: Checkpoint,
    windows: NDArray[np.int64],
    folder: Path,
    progress: Progress | None = None,
    device: Device = HOST,
    *,
    tunes: bool = False,
) -> StoredStatistics:
    """Run windows of text through a model and keep what its matrices see, and how much their errors matter.

    Memory: the float32 weights outside the layers and of one layer, the hidden states of all windows, and 16 bytes x
    columns^2 for each matrix of a layer. On disk, or on a GPU that has room for it: the hidden states of at most 64
    windows before each layer, and the statistics, 2 bytes x columns^2 for each matrix. A model whose layers cannot be
    run one at a time is in memory as a whole; see `measure_whole`.

    Args:
        checkpoint: the model.
        windows: token ids, shape (windows, tokens).
        folder: where the statistics go; an empty folder that outlives the result.
        progress: called with the steps done and in all; they begin anew where a model turns out to need another way.
        device: what computes. Where several processes share it, each runs a part of the windows, and the first one
            alone has the statistics of matrices.
        tunes: whether the model will be tuned; if it is measured as a whole, the memory must have room for that too.
    Raises:
        EntroLLMError: activations or gradients are not finite, or a model that is measured as a whole does not fit.
        FormatError: a tensor is missing or has another shape.
        UnsupportedError: transformers does not know the model, or it does not read text.
    """
    place = device if isinstance(device, TorchDevice) else TorchDevice("cpu")
    found = _walked(checkpoint, windows, folder, progress, device, place)
    if isinstance(found, StoredStatistics):
        return found
    stored = StoredStatistics(folder, windows, device)
    measure_whole(checkpoint, windows, stored, place, progress, why=found, tunes=tunes)
    return stored


def _walked(
    checkpoint: Checkpoint,
    windows: NDArray[np.int64],
    folder: Path,
    progress: Progress | None,
    device: Device,
    place: TorchDevice,
) -> StoredStatistics | str:
    """What a walk through the layers finds, or why there is none; then the folder is empty and all memory free."""
    network = Network(checkpoint, place)
    room = room_beside(network, windows.size, place)
    stored = StoredStatistics(folder, windows, device, room)
    spool = Spool(folder, place, room)
    try:
        walk(network, windows, stored, spool, progress)
    except UnwalkableError as error:
        tell_unwalkable(error, device.group)
        spool.clear()
        return str(error)
    return stored
