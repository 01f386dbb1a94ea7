"""A few kills of every kind of run; `python -m tests.kills` makes as many as you like."""

from __future__ import annotations

import os

import pytest

if not hasattr(os, "fork"):
    pytest.skip("this system has no fork", allow_module_level=True)

from tests.kills.campaign import run


@pytest.mark.parametrize(("mode", "kills"), [("overwrite", 3), ("gptq", 3), ("self", 1)])
def test_killed_at_random_moments(mode: str, kills: int) -> None:
    outcome = run(mode, kills=kills, seed=5)
    assert not outcome.faults, dict(outcome.faults)
    assert outcome.kills == sum(outcome.states.values()) >= kills
