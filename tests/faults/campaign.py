"""Fail, or kill a run at, each of its calls that change the disk: nothing is lost, and the same call ends equally."""

from __future__ import annotations

import ctypes
import errno
import math
import mmap
import os
import pickle
import shutil
import signal
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from entrollm import CompressOptions, compress
from entrollm.errors import EntroLLMError, OptionError
from tests.kills.campaign import MODES, files_of, kind_of_place, preload

ACTIONS = {"kill": 0, "ENOSPC": errno.ENOSPC, "EDQUOT": errno.EDQUOT, "EIO": errno.EIO, "EACCES": errno.EACCES}
_WHERE_BYTES = 4096


@dataclass
class Outcome:
    """What a campaign found.

    Attributes:
        steps: calls of a whole run that change the disk.
        next_step: the first of them that there was no time for; `steps` if there is none.
        runs: runs that were disturbed.
        states: what was at the output's place afterwards, as `kind_of_place` calls it.
        faults: what was wrong, by what was found and at which call.
    """

    steps: int = 0
    next_step: int = 0
    runs: int = 0
    states: Counter[str] = field(default_factory=Counter)
    faults: Counter[str] = field(default_factory=Counter)


def environment(library: Path) -> dict[str, str]:
    """Compile the library that makes calls fail; returns the environment for a process in which they can.

    Raises:
        FileNotFoundError: there is no compiler.
    """
    command = ["cc", "-shared", "-fPIC", "-O1", "-o", str(library), str(Path(__file__).with_name("shim.c")), "-ldl"]
    subprocess.run(command, check=True)
    return {**os.environ, "LD_PRELOAD": str(library)}


class _Runs:
    """Runs of one mode in processes of their own."""

    def __init__(self, work: Path, name: str) -> None:
        self.mode = MODES[name]
        self.place, self.temporary = work / "place", work / "temporary"
        self.out = self.place / "out"
        self._work = os.fsencode(work)
        self._where = mmap.mmap(-1, _WHERE_BYTES)
        self._library = ctypes.CDLL(None)
        self.temporary.mkdir()
        self._model, self._options = self.mode.prepare(work)
        preload(self._options, lambda: compress(self._model, self.out, self._options))
        self._old_folder = work / "old"
        if self.mode.over_itself:
            self.out.rename(self._old_folder)
        elif self.mode.overwrite:
            self._in_child(lambda: compress(self._model, self._old_folder, CompressOptions(bpw=6.5)))
        self.old = files_of(self._old_folder)

    def reset(self) -> None:
        """Put nothing, or the earlier output, at the output's place."""
        shutil.rmtree(self.place, ignore_errors=True)
        if self.old is not None:
            shutil.copytree(self._old_folder, self.out)

    def run(self, step: int = -1, error: int = 0, lasting: bool = False) -> tuple[int, BaseException | None, int]:
        """Compress; returns the exit code, the error, and the calls that were seen."""
        self._where[:] = bytes(_WHERE_BYTES)
        address = ctypes.addressof(ctypes.c_char.from_buffer(self._where))

        def work() -> int:
            tempfile.tempdir = str(self.temporary)
            self._library.faults_arm(self._work, ctypes.c_long(step), error, int(lasting), ctypes.c_void_p(address))
            try:
                compress(self._model, self.out, self._options, overwrite=self.mode.overwrite)
            finally:
                seen = int(self._library.faults_seen())
                self._library.faults_arm(None, ctypes.c_long(-1), 0, 0, None)
            return seen

        return self._in_child(work)

    def hit(self) -> str:
        """The call that failed last, without the folder of this campaign."""
        text = self._where[:].partition(b"\0")[0].decode()
        return text.replace(self._work.decode(), "").replace("/place/", "")

    def _in_child(self, work: Callable[[], object]) -> tuple[int, BaseException | None, int]:
        read, write = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(read)
            found: tuple[BaseException | None, object] = None, -1
            try:
                found = None, work()
            except BaseException as raised:
                found = raised, -1
            with os.fdopen(write, "wb") as pipe:
                pipe.write(_pickled(found))
            os._exit(0)
        os.close(write)
        with os.fdopen(read, "rb") as pipe:
            content = pipe.read()
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if not content:
            return code, None, -1
        error, seen = pickle.loads(content)
        return code, error, seen if isinstance(seen, int) else -1


def _pickled(found: tuple[BaseException | None, object]) -> bytes:
    try:
        content = pickle.dumps(found)
        pickle.loads(content)
    except Exception:
        return pickle.dumps((RuntimeError(f"{type(found[0]).__name__}: {found[0]}"), -1))
    return content


def run(
    name: str,
    *,
    actions: tuple[str, ...] = tuple(ACTIONS),
    stride: int = 1,
    first: int = 0,
    seconds: float = math.inf,
) -> Outcome:
    """Disturb a mode's runs, in each way, at every `stride`-th call that changes the disk, for `seconds` at most."""
    work = Path(tempfile.mkdtemp(prefix="entrollm-faults-"))
    outcome = Outcome(next_step=first)
    end = time.monotonic() + seconds
    try:
        runs = _Runs(work, name)
        runs.reset()
        code, error, outcome.steps = runs.run()
        if code or error or outcome.steps <= 0:
            raise RuntimeError(f"the undisturbed run ended with {code}, {error!r}, {outcome.steps} calls")
        new = files_of(runs.out)
        assert new is not None and (new == runs.old) == runs.mode.over_itself
        while outcome.next_step < outcome.steps and time.monotonic() < end:
            for action in actions:
                runs.reset()
                _disturb(runs, outcome, new, outcome.next_step, action)
            outcome.next_step = min(outcome.steps, outcome.next_step + stride)
    finally:
        shutil.rmtree(work)
    return outcome


def _disturb(runs: _Runs, outcome: Outcome, new: dict[str, bytes], step: int, action: str) -> None:
    code, error, _ = runs.run(step, ACTIONS[action], lasting=action in ("ENOSPC", "EDQUOT"))
    outcome.runs += 1
    where = f"{action} at {runs.hit()}"
    state = kind_of_place(files_of(runs.out), runs.old, new)
    outcome.states[state] += 1

    def note(fault: str) -> None:
        outcome.faults[f"{where}: {fault}"] += 1

    if state == "half" or (state == "none" and runs.old is not None):
        note(f"{state} at the output's place")
    if code not in ((-signal.SIGKILL,) if action == "kill" else (0,)):
        note(f"exit code {code}")
    elif error is None and action != "kill" and state not in ("new", "same"):
        note("no error, and no output")
    elif error is not None:
        _check_error(error, state, note)
    code, error, _ = runs.run()
    is_refused = state == "new" and not runs.mode.overwrite
    if is_refused:
        if code or not isinstance(error, OptionError):
            note(f"the same call ended with {code}, {error!r}")
    elif code or error is not None:
        note(f"the same call ended with {code}, {error!r}")
    elif files_of(runs.out) != new:
        note("other files after the same call")
    left = {path.name for path in runs.place.iterdir()} - {"out"}
    if not is_refused:  # a scratch folder that could not be removed stays until the next calibration
        left |= {path.name for path in runs.temporary.iterdir()}
    if left:
        note(f"left behind: {', '.join(sorted(left))}")


def _check_error(error: BaseException, state: str, note: Callable[[str], None]) -> None:
    if not isinstance(error, EntroLLMError | ValueError | OSError):
        note(f"{error!r}")
    elif isinstance(error, OSError) and error.filename is None:
        note(f"{error!r} names no file")
    if state == "new":
        note(f"{error!r} after a complete output")
