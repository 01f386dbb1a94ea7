"""Run mutations of a target: only the product's own errors may leave a parser, in time and in little memory."""

from __future__ import annotations

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

from entrollm.errors import EntroLLMError
from tests.fuzz.targets import TARGETS

TIME_LIMIT_S = 5
MEMORY_LIMIT_BYTES = 300_000_000
# Those that the command line reports in one line.
_REPORTED = (EntroLLMError, ValueError, OSError)


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
        end = time.monotonic() + seconds
        with _limits(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of arithmetic with hostile numbers
            while outcome.inputs < inputs and time.monotonic() < end:
                number = seed + outcome.inputs
                generator = random.Random(number)
                target.mutate(work, generator.choice(seeds), generator)
                _read(name, work, number, outcome)
    finally:
        shutil.rmtree(work)
    return outcome


def _read(name: str, work: Path, number: int, outcome: Outcome) -> None:
    outcome.inputs += 1
    start = time.process_time()
    signal.setitimer(signal.ITIMER_PROF, TIME_LIMIT_S)
    try:
        TARGETS[name].read(work)
        outcome.accepted += 1
    except _REPORTED:
        pass
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # panics of extension modules are no Exception
        frame = traceback.extract_tb(error.__traceback__)[-1]
        fault = f"{type(error).__name__} at {Path(frame.filename).name}:{frame.lineno}: {error!s:.80}"
        key = f"{type(error).__name__} at {Path(frame.filename).name}:{frame.lineno}"
        outcome.faults[key] += 1
        outcome.examples.setdefault(key, (number, fault + "\n" + "".join(traceback.format_exception(error))))
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
    outcome.slowest_s = max(outcome.slowest_s, time.process_time() - start)


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
