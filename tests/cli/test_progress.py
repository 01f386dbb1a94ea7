"""Bars of a compression: one at a time, none where quiet."""

import io
import sys

import pytest

from entrollm.cli import console
from entrollm.cli.progress import ProgressBars


@pytest.mark.parametrize("quiet", [False, True])
def test_stages_have_their_own_bars(monkeypatch: pytest.MonkeyPatch, quiet: bool) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    stream = Terminal()
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setattr(console, "stderr", console.Console(stderr=True, force_terminal=True, width=100))
    with ProgressBars(quiet, compressing="compressing to out") as progress:
        progress.advance("calibrating", 1, 2)
        progress.advance("compressing", 10, 20)
        progress.advance("compressing", 20, 20)
    shown = stream.getvalue()
    assert ("layers/s" in shown) != quiet
    assert ("compressing to out" in shown) != quiet
    assert ("weights/s" in shown) != quiet
