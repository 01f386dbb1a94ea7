"""Run mutations of a target: only errors that the product raises itself may leave a parser, in time and in little
memory."""

from __future__ import annotations

import gc
import linecache
import os
import random
import resource
import shutil
import signal
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

import entrollm
from entrollm.errors import EntroLLMError
from tests.fuzz.targets import TARGETS

TIME_LIMIT_S = 5
MEMORY_LIMIT_BYTES = 300_000_000
# Where the product and these targets are.
_OURS = (str(Path(entrollm.__file__).parent), str(Path(__file__).parent))


class TooSlowError(BaseException):
    """An input took more processor time than the limit; no parser catches this."""


@dataclass
class Outcome:
    """What a campaign found.

    Attributes:
        inputs: inputs that were read.
        accepted: those that were read without an error.
        faults: the number of inputs by the last frame of the error that left the parser.
        examples: for each of them the seed of the first input, and its traceback.
        slowest_s: the longest processor time of an input.
    """

    inputs: int = 0
    accepted: int = 0
    faults: Counter[str] = field(default_factory=Counter)
    examples: dict[str, tuple[int, str]] = field(default_factory=dict)
    slowest_s: float = 0.0


def run(name: str, *, inputs: int, seconds: float, seed: int = 0) -> Outcome:
    """Read mutations until there were `inputs` of them or `seconds` have passed; input i is made from `seed + i`."""
    target = TARGETS[name]
    outcome = Outcome()
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None  # files that are written a million times
    work = Path(tempfile.mkdtemp(prefix="entrollm-fuzz-", dir=memory))
    try:
        seeds = target.prepare(work)
        gc.collect()
        gc.freeze()  # what the imports made is not looked through again and again
        end = time.monotonic() + seconds
        with _limits(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of arithmetic with hostile numbers
            while outcome.inputs < inputs and time.monotonic() < end:
                number = seed + outcome.inputs
                generator = random.Random(number)
                target.mutate(work, generator.choice(seeds), generator)
                _read(name, work, number, outcome)
    finally:
        gc.unfreeze()
        shutil.rmtree(work)
    return outcome


def _read(name: str, work: Path, number: int, outcome: Outcome) -> None:
    outcome.inputs += 1
    start = time.process_time()
    signal.setitimer(signal.ITIMER_PROF, TIME_LIMIT_S)
    try:
        TARGETS[name].read(work)
        outcome.accepted += 1
    except EntroLLMError:
        pass
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # panics of extension modules are no Exception
        if not _is_reported(error):
            _note(outcome, number, error)
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
    outcome.slowest_s = max(outcome.slowest_s, time.process_time() - start)


def _is_reported(error: BaseException) -> bool:
    """Whether an error is one that a check raised, which says what was wrong and where."""
    if not isinstance(error, ValueError | OSError):
        return False
    if isinstance(error, OSError) and error.filename is not None:
        return True
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    if trace is None:
        return False
    name = trace.tb_frame.f_code.co_filename
    is_ours = name.startswith(_OURS)
    return is_ours and linecache.getline(name, trace.tb_lineno).lstrip().startswith("raise ")


def _note(outcome: Outcome, number: int, error: BaseException) -> None:
    frame = traceback.extract_tb(error.__traceback__)[-1]
    fault = f"{type(error).__name__} at {Path(frame.filename).name}:{frame.lineno}: {error!s:.80}"
    key = f"{type(error).__name__} at {Path(frame.filename).name}:{frame.lineno}"
    outcome.faults[key] += 1
    outcome.examples.setdefault(key, (number, fault + "\n" + "".join(traceback.format_exception(error))))


@contextmanager
def _limits() -> Iterator[None]:
    """Limit the processor time of each input, which a busy machine does not lengthen, and the memory of all."""

    def stop(signum: int, frame: FrameType | None) -> None:
        raise TooSlowError(f"over {TIME_LIMIT_S} s")

    earlier = signal.signal(signal.SIGPROF, stop)
    limits = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (_data_bytes() + MEMORY_LIMIT_BYTES, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, limits)
        signal.signal(signal.SIGPROF, earlier)


def _data_bytes() -> int:
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmData"))
