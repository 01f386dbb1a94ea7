"""The progress of a compression on a terminal."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import ExitStack
from types import TracebackType
from typing import TYPE_CHECKING, Self

from entrollm.cli.console import progress_bar, stdout

if TYPE_CHECKING:
    from entrollm.recipes import Stage
    from entrollm.recipes.search import Trial

_UNITS = {
    "writing": "tokens",
    "calibrating": "layers",
    "compressing": "weights",
    "tuning": "windows",
    "measuring": "tokens",
}


class ProgressBars:
    """Shows one bar at a time, for the stage in progress; implements `entrollm.Progress`.

    Use it as a context manager, which removes the last bar.

    Args:
        quiet: show nothing.
        names: what to call stages, where it is not their own name.
    """

    def __init__(self, quiet: bool, **names: str) -> None:
        self._quiet = quiet
        self._names = names
        self._stage: Stage | None = None
        self._shown = ExitStack()
        self._update: Callable[[float, float], None] | None = None
        self._lock = threading.Lock()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._close()

    def advance(self, stage: Stage, done: float, total: float) -> None:
        """Move the bar of a stage."""
        with self._lock:
            if self._update is None or stage != self._stage:
                self._close()
                name, unit = self._names.get(stage, stage), _UNITS[stage]
                self._stage = stage
                self._update = self._shown.enter_context(progress_bar(name, unit, quiet=self._quiet))
            self._update(done, total)

    def tried(self, trial: Trial) -> None:
        """Print a line for a size that the search has measured."""
        with self._lock:
            self._close()
            if not self._quiet:
                stdout.print(f"{trial.file_bits:.3f} bits/weight: KL {trial.divergence.mean:.4g}")

    def _close(self) -> None:
        self._shown.close()
        self._update = None
