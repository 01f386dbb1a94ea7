"""What the other processes do while the first one quantizes and writes: their part of the work on windows."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from entrollm.calibrate.drift import DriftWalk
from entrollm.calibrate.store import StoredStatistics
from entrollm.checkpoint.model_folder import Checkpoint
from entrollm.checkpoint.resolve import resolve
from entrollm.errors import EntroLLMError


def follow(
    model: str | Path, statistics: StoredStatistics, tasks: Mapping[str, Callable[[Path], Any]] | None = None
) -> None:
    """Take part in what the first process does with `statistics`, until it gives `None` to the others.

    Args:
        model: the checkpoint, a folder or a Hub id.
        statistics: those of `measure` in this process.
        tasks: what else the first process may ask for, by name, each on a folder that it has written.
    Raises:
        EntroLLMError: this process cannot see such a folder, or a process has ended.
    """
    group = statistics.device.group
    walk: DriftWalk | None = None
    with Checkpoint.open(resolve(model)) as checkpoint:
        while (order := group.from_first(None)) is not None:
            action, value = order
            if action == "drift":
                walk = None  # frees the hidden states of the last one
                statistics.streams, statistics.repeated = value
                walk = statistics.drift(checkpoint)
            elif action == "correct":
                assert walk is not None  # the first process has one
                walk.correction(value)
            else:
                assert tasks is not None
                walk = None
                if not Path(value).is_dir():
                    raise EntroLLMError(
                        f"process {group.rank} cannot see {value}, which the first process has written; "
                        "use a folder that all machines share"
                    )
                tasks[action](Path(value))
