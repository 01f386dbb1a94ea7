"""Steps are taken with the number of threads that is quicker at the time."""

from collections.abc import Callable, Iterator

import pytest
import torch

from entrollm.calibrate import threads
from entrollm.calibrate.threads import QuickestThreads


@pytest.fixture(autouse=True)
def three_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


def taken(monkeypatch: pytest.MonkeyPatch, steps: int, duration: Callable[[int, int], float]) -> list[int]:
    """The threads of each step, where a step takes `duration(step, threads)`."""
    now = 0.0
    monkeypatch.setattr(threads.time, "perf_counter", lambda: now)
    quickest = QuickestThreads()
    found = []
    for step in range(steps):
        with quickest.step():
            found.append(torch.get_num_threads())
            now += duration(step, found[-1])
        assert torch.get_num_threads() == 3
    return found


@pytest.mark.parametrize("quicker", [1, 3])
def test_most_steps_are_the_quicker_ones(monkeypatch: pytest.MonkeyPatch, quicker: int) -> None:
    found = taken(monkeypatch, 320, lambda _, count: 1.0 if count == quicker else 2.0)
    assert found.count(quicker) >= 296


def test_the_choice_follows_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    found = taken(monkeypatch, 320, lambda step, count: 2.0 if (step >= 160) == (count == 3) else 1.0)
    assert found[:160].count(3) >= 140
    assert found[160:].count(1) >= 120


def test_a_step_that_fails_leaves_the_threads_as_they_were() -> None:
    with pytest.raises(KeyError), QuickestThreads().step():
        raise KeyError
    assert torch.get_num_threads() == 3
