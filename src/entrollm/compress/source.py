"""Whether the files of a checkpoint are still those that were read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from entrollm.checkpoint.model_folder import Checkpoint
from entrollm.errors import EntroLLMError

Stamps = Mapping[str, Sequence[int]]
"""Sizes in bytes and times in nanoseconds of weight files, by path."""


def stamps(checkpoint: Checkpoint) -> dict[str, list[int]]:
    """The sizes and times of the weight files.

    Raises:
        FileNotFoundError: one is gone.
    """
    found = {str(file.resolve()): file.stat() for file in checkpoint.files}
    return {name: [stat.st_size, stat.st_mtime_ns] for name, stat in found.items()}


def check_unchanged(checkpoint: Checkpoint, earlier: Stamps, work: str = "compressed") -> None:
    """Check that the weight files are those of an earlier moment, so that no output mixes two states of a model.

    Args:
        checkpoint: the checkpoint.
        earlier: its stamps then.
        work: what was done with it in between.
    Raises:
        EntroLLMError: one has changed or is gone.
    """
    try:
        now = stamps(checkpoint)
    except FileNotFoundError as error:
        raise EntroLLMError(
            f"{error.filename} was removed while it was {work}; put it back and run the command again"
        ) from None
    for name in earlier.keys() | now.keys():
        if list(earlier.get(name, ())) != now.get(name):
            raise EntroLLMError(f"{name} changed while it was {work}; run the command again when it is complete")
