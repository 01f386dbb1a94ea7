"""A short campaign against every parser; `python -m tests.fuzz` runs a long one."""

from __future__ import annotations

import random
import sys

import pytest

if sys.platform != "linux":
    pytest.skip("the limits of memory and time are those of Linux", allow_module_level=True)

from tests.fuzz import campaign, targets
from tests.fuzz.mutate import mutate_json, mutate_text
from tests.fuzz.target import Target

INPUTS = 250


@pytest.mark.parametrize("name", targets.TARGETS)
def test_only_the_products_errors_leave_a_parser(name: str) -> None:
    outcome = campaign.run(name, inputs=INPUTS, seconds=30, seed=1000)
    assert not outcome.faults, "\n".join(text for _, text in outcome.examples.values())
    assert outcome.inputs == INPUTS
    assert 0 < outcome.accepted < INPUTS  # mutations reach past the first check, and are no copies


def test_faults_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """An error of another kind or that no check raised, a panic, an endless loop and a large table are all faults."""

    class PanicException(BaseException):
        pass

    def read(folder: object) -> object:
        fault = next(faults)
        if isinstance(fault, BaseException):
            raise fault
        if fault == "number":
            int("x")
        if fault == "loop":
            while True:
                pass
        return b"x" * (2 * campaign.MEMORY_LIMIT_BYTES)

    faults = iter((KeyError("x"), PanicException("x"), "loop", "memory", "number", ValueError("reported")))
    target = Target(lambda folder: [None], lambda folder, seed, generator: None, read)
    monkeypatch.setattr(campaign, "TARGETS", {"broken": target})
    monkeypatch.setattr(campaign, "TIME_LIMIT_S", 0.05)
    outcome = campaign.run("broken", inputs=6, seconds=30)
    found = sorted(key.partition(" ")[0] for key in outcome.faults)
    assert found == ["KeyError", "MemoryError", "PanicException", "TooSlowError", "ValueError"]
    assert outcome.examples[next(key for key in outcome.faults if key.startswith("KeyError"))][0] == 0


def test_an_input_is_made_again_from_its_seed() -> None:
    value = {"a": [1, 2.5, "text", None, True], "b": {"c": []}}
    for seed in range(200):
        first, again = (mutate_json(value, random.Random(seed)) for _ in range(2))
        assert repr(first) == repr(again)
        assert mutate_text(b'{"a": 1}', random.Random(seed)) == mutate_text(b'{"a": 1}', random.Random(seed))
    assert value == {"a": [1, 2.5, "text", None, True], "b": {"c": []}}
