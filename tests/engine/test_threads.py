"""How many worker threads there are, and how long they stay awake."""

from __future__ import annotations

from pathlib import Path

import pytest

from entrollm import _core
from entrollm.threads import default_threads, performance_cores, spin_us


def test_the_time_awake_can_be_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ENTROLLM_SPIN_US", raising=False)
    assert spin_us() == 200
    for text in ("0", "50"):
        monkeypatch.setenv("ENTROLLM_SPIN_US", text)
        assert spin_us() == int(text)
        assert _core.ThreadPool(3, spin_us()).size == 3


@pytest.mark.parametrize("text", ["", "-1", "ten", "1.5", "1000001", "9" * 5000])
def test_a_time_that_is_none_is_refused(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv("ENTROLLM_SPIN_US", text)
    with pytest.raises(ValueError, match="ENTROLLM_SPIN_US should be an integer from 0 to 1000000"):
        spin_us()


def _describe(system: Path, siblings: dict[int, str], capacity: dict[int, int] | None = None) -> Path:
    for cpu, shared in siblings.items():
        topology = system / f"cpu/cpu{cpu}/topology"
        topology.mkdir(parents=True)
        (topology / "thread_siblings_list").write_text(shared + "\n")
        if capacity is not None:
            (system / f"cpu/cpu{cpu}/cpu_capacity").write_text(f"{capacity[cpu]}\n")
    return system


def test_a_core_with_two_threads_counts_once(tmp_path: Path) -> None:
    pairs = _describe(tmp_path, {0: "0,4", 1: "1,5", 2: "2,6", 3: "3,7", 4: "0,4", 5: "1,5", 6: "2,6", 7: "3,7"})
    assert performance_cores(set(range(8)), pairs) == {0, 1, 2, 3}
    assert performance_cores({4, 5}, pairs) == {4, 5}
    assert performance_cores({0, 4}, pairs) == {0}


def test_the_slower_cores_of_two_kinds_are_left_out(tmp_path: Path) -> None:
    hybrid = _describe(tmp_path / "intel", {0: "0-1", 1: "0-1", 2: "2-3", 3: "2-3", 4: "4", 5: "5"})
    (hybrid / "cpu_core").mkdir()
    (hybrid / "cpu_core/cpus").write_text("0-3\n")
    assert performance_cores(set(range(6)), hybrid) == {0, 2}
    assert performance_cores({4, 5}, hybrid) == {4, 5}  # bound to slow cores
    alone = {cpu: str(cpu) for cpu in range(6)}
    big_little = _describe(tmp_path / "arm", alone, {0: 250, 1: 250, 2: 250, 3: 250, 4: 1024, 5: 1000})
    assert performance_cores(set(range(6)), big_little) == {4, 5}


def test_cores_that_nothing_describes_are_alike(tmp_path: Path) -> None:
    assert performance_cores({0, 1, 2}, tmp_path) == {0, 1, 2}
    assert default_threads() >= 1
