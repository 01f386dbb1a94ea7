"""Which kernels run, and how a user picks them."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from entrollm import _core
from tests.support.isa_workers import InstructionSets

_ASK = "from entrollm import _core; print(_core.isa())"


def ask(isa: str | None) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "ENTROLLM_ISA"}
    if isa is not None:
        environment["ENTROLLM_ISA"] = isa
    return subprocess.run([sys.executable, "-c", _ASK], env=environment, capture_output=True, text=True, check=False)


def test_the_portable_kernels_are_always_there(instruction_sets: InstructionSets) -> None:
    assert "scalar" in instruction_sets.names


def test_the_fastest_kernels_are_the_default(instruction_sets: InstructionSets) -> None:
    assert ask(None).stdout.strip() == instruction_sets.names[-1]
    assert ask("").stdout.strip() == instruction_sets.names[-1]


def test_unknown_kernels_are_refused() -> None:
    result = ask("mmx")
    assert result.returncode != 0
    assert "ValueError: ENTROLLM_ISA=mmx is not one of: " in result.stderr
    assert "scalar" in result.stderr


def test_a_choice_is_kept(instruction_sets: InstructionSets) -> None:
    for name in instruction_sets.names:
        assert ask(name).stdout.strip() == name


def test_kernels_that_the_processor_lacks_are_refused() -> None:
    missing = [name for name, runs in _core.isas() if not runs]
    if not missing:
        pytest.skip("this processor runs every set of kernels in this build")
    for name in missing:
        assert f"ENTROLLM_ISA={name}: this processor lacks it" in ask(name).stderr
