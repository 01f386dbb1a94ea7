"""The processes that torchrun starts: which commands share their work, and which of them speaks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import typer

from entrollm.cli.usage import UsageError
from entrollm.processes import ALONE, Group, is_first, is_shared


def refuse_to_share(command: str) -> None:
    """End a command that several processes would do several times.

    Raises:
        UsageError: in the first process; the others end without a word.
    """
    if not is_shared():
        return
    if not is_first():
        raise typer.Exit
    raise UsageError(f"torchrun is for compress with --calibration; start {command} without it")


@contextmanager
def shared_by_torchrun(device: str) -> Iterator[Group]:
    """The group of processes that torchrun started; this process alone if it did not start several.

    Where one process fails, torchrun ends the others; those that fail as well before that do it without a word.

    Args:
        device: what computes, "cuda" or "cpu".
    """
    if not is_shared():
        yield ALONE
        return
    from entrollm.torch.group import TorchGroup

    group = TorchGroup(device)
    try:
        group.open()
        yield group
    except (Exception, KeyboardInterrupt):
        if not group.is_first_to_fail():
            raise typer.Exit(1) from None
        raise
