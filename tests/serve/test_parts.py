"""The scheduler's parts on their own: queue, pace, slots, keys, counters."""

from __future__ import annotations

import ctypes
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from entrollm import Model, load
from entrollm.engine.batch import SequenceStep
from entrollm.serve.fair_queue import FairQueue, QueueFullError
from entrollm.serve.keys import Keys, read_keys
from entrollm.serve.metrics import Metrics
from entrollm.serve.pace import Pace
from entrollm.serve.slots import Slot, Slots


@pytest.fixture(scope="module")
def model(folder: Path) -> Model:
    return load(folder, threads=1)


def test_clients_take_turns() -> None:
    queue: FairQueue[str] = FairQueue(10)
    queue.add("a", ["a1", "a2", "a3"])
    queue.add("b", ["b1"])
    queue.add("c", ["c1", "c2"])
    assert len(queue) == 6
    assert [queue.take(lambda _: True) for _ in range(7)] == ["a1", "b1", "c1", "a2", "c2", "a3", None]
    assert len(queue) == 0


def test_a_line_keeps_its_order_while_others_pass() -> None:
    queue: FairQueue[str] = FairQueue(10)
    queue.add("a", ["big", "small"])
    queue.add("b", ["small2"])
    assert queue.take(lambda item: item != "big") == "small2"
    assert queue.take(lambda item: item != "big") is None
    assert queue.take(lambda _: True) == "big"


def test_a_full_queue_takes_all_or_nothing() -> None:
    queue: FairQueue[int] = FairQueue(3)
    queue.add("a", [1, 2])
    with pytest.raises(QueueFullError):
        queue.add("b", [3, 4])
    queue.add("b", [3])
    assert queue.remove(lambda item: item % 2 == 1) == [1, 3]
    assert [queue.take(lambda _: True), queue.take(lambda _: True), len(queue)] == [2, None, 0]


def test_prompts_are_read_in_pieces_that_cost_less_than_a_step() -> None:
    pace = Pace()
    assert pace.prompt_tokens(0) == 512
    assert pace.prompt_tokens(3) == 32
    for _ in range(20):
        pace.record(3, 0, 0.040)
        pace.record(3, 10, 0.040 + 10 * 0.001)
    assert 31 <= pace.prompt_tokens(3) <= 32  # 0.8 * 40 ms at 1 ms a token
    for _ in range(40):
        pace.record(3, 10, 0.040 + 10 * 0.004)
    assert 7 <= pace.prompt_tokens(3) <= 9
    for _ in range(40):
        pace.record(3, 10, 0.030)  # noise must not divide by nothing
    assert 8 <= pace.prompt_tokens(3) <= 512


def test_a_few_slow_steps_before_a_prompt_make_no_room_for_it() -> None:
    pace = Pace()
    for _ in range(20):
        pace.record(1, 0, 0.020)
        pace.record(1, 4, 0.020 + 4 * 0.001)
    for _ in range(3):
        pace.record(1, 0, 0.060)
    assert 15 <= pace.prompt_tokens(1) <= 16  # 0.8 * 20 ms at 1 ms a token


def test_pieces_that_take_long_make_room_for_streams() -> None:
    pace = Pace(least=256)
    assert pace.prompt_tokens(1) == 256
    pace.record(1, 0, 0.004)
    pace.record(1, 256, 0.004 + 0.032)
    steps = 0
    while pace.prompt_tokens(1) == 0:
        assert pace.prompt_tokens(0) == 512
        pace.record(1, 0, 0.004)
        steps += 1
    assert 9 <= steps <= 10  # 0.032 s at 0.8 of 4 ms a step
    assert pace.prompt_tokens(1) == 256


def test_the_pace_is_learnt_from_prompts_alone() -> None:
    pace = Pace()
    pace.record(0, 100, 0.1)
    pace.record(2, 0, 0.02)
    assert pace.prompt_tokens(2) == 16


def run(model: Model, slot: Slot, ids: list[int]) -> None:
    model.step([SequenceStep(np.array(ids), slot.cache)])


def test_the_slot_with_the_longest_beginning_is_used_again(model: Model) -> None:
    slots = Slots(model, 3)
    first, reused = slots.take([5, 6, 7, 8])
    assert reused == 0
    run(model, first, [5, 6, 7, 8])
    slots.give_back(first)
    again, reused = slots.take([5, 6, 7, 9])
    assert (again, reused) == (first, 3)
    assert again.cache.ids == [5, 6, 7]
    assert slots.busy == 1


def test_a_running_sequence_is_forked(model: Model) -> None:
    slots = Slots(model, 2)
    first, _ = slots.take([5, 6, 7, 8])
    run(model, first, [5, 6, 7, 8])
    second, reused = slots.take([5, 6, 7, 9])
    assert second is not first
    assert (reused, second.cache.ids, first.cache.ids) == (3, [5, 6, 7], [5, 6, 7, 8])
    assert not slots.has_room


def test_a_long_dialogue_is_not_given_up_for_a_short_beginning(model: Model) -> None:
    slots = Slots(model, 2)
    long, _ = slots.take([5, *range(20, 40)])
    run(model, long, [5, *range(20, 40)])
    slots.give_back(long)
    other, reused = slots.take([5, 6, 7])
    assert other is not long
    assert (reused, long.cache.length) == (1, 21)
    slots.give_back(other)
    # With one slot left, the least recently used cache goes.
    taken, _ = slots.take([5, *range(20, 40), 3])
    assert taken is long
    last, reused = slots.take([9, 9])
    assert (last, reused, last.cache.ids) == (other, 0, [])


def test_an_interrupted_cache_is_dropped(model: Model) -> None:
    slots = Slots(model, 1)
    slot, _ = slots.take([5, 6])
    run(model, slot, [5, 6])
    slots.give_back(slot, keep=False)
    assert slots.take([5, 6, 7]) == (slot, 0)


def test_a_prompt_that_is_only_read_leaves_the_caches_alone(model: Model) -> None:
    slots = Slots(model, 1)
    slot, _ = slots.take([5, 6])
    run(model, slot, [5, 6])
    slots.give_back(slot)
    reading = slots.take_empty()
    run(model, reading, [7, 8, 9])
    assert reading.cache.ids == [7, 8, 9]
    slots.give_back(reading, keep=False)
    assert slots.take([5, 6, 7]) == (slot, 2)
    slots.give_back(slot)
    # One that is answered takes the place of the former.
    reading = slots.take_empty()
    run(model, reading, [7, 8, 9])
    slots.give_back(reading)
    assert slots.take([7, 8, 9]) == (slot, 2)


def test_labels_of_metrics_are_escaped() -> None:
    metrics = Metrics()
    metrics.requests['a"b\\c\nd', 200] = 3
    assert metrics.render({}).splitlines()[1] == r'entrollm_requests_total{path="a\"b\\c\nd",status="200"} 3'


def test_keys() -> None:
    keys = Keys(["first", "second"])
    assert keys.owner("Bearer second") == 1
    assert keys.owner("bearer first ") == 0
    for wrong in (None, "", "first", "Bearer", "Bearer firs", "Bearer firstt", "Basic first", "Bearer é\udce9"):
        assert keys.owner(wrong) is None, wrong


def test_key_files(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("# team a\nabc\n\n  def  \n")
    assert [read_keys(file).owner(f"Bearer {key}") for key in ("abc", "def", "#")] == [0, 1, None]
    for text, message in (
        ("# nothing\n", "holds no key; write one per line"),
        ("abc\nd ef\n", "line 2: a key may hold no spaces"),
        ("schlüssel\n", "line 1: a key may hold no spaces and only ASCII"),
    ):
        file.write_text(text)
        with pytest.raises(ValueError, match=message):
            read_keys(file)
    file.write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match="not UTF-8"):
        read_keys(file)


ARENAS = """
import ctypes, re, sys, threading
from entrollm.serve.trim import limit_arenas

if "limited" in sys.argv:
    limit_arenas()
held, together = [], threading.Barrier(9)

def work():
    held.append(bytearray(100_000))
    together.wait()

threads = [threading.Thread(target=work) for _ in range(8)]
for thread in threads:
    thread.start()
together.wait()
library = ctypes.CDLL(None)
library.fopen.restype = ctypes.c_void_p
file = ctypes.c_void_p(library.fopen(sys.argv[1].encode(), b"w"))
library.malloc_info(0, file)
library.fclose(file)
print(len(re.findall("<heap nr", open(sys.argv[1]).read())))
"""


@pytest.mark.skipif(
    not (sys.platform.startswith("linux") and hasattr(ctypes.CDLL(None), "malloc_info")), reason="needs glibc"
)
def test_threads_share_the_memory_that_others_freed(tmp_path: Path) -> None:
    def arenas(*arguments: str) -> int:
        command = [sys.executable, "-c", ARENAS, str(tmp_path / "info.xml"), *arguments]
        return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)

    assert arenas("limited") <= 2 < arenas()
