"""Kill compression at random moments: nothing half made is ever at its place, and the same call ends equally."""

from __future__ import annotations

import contextlib
import importlib
import json
import math
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from entrollm import CompressOptions, compress
from tests.checkpoint.imported.test_damage import SOURCES
from tests.engine.tokenizers_for_tests import byte_level
from tests.support.checkpoints import write_checkpoint, write_random_llama
from tests.support.gguf_sources import llama_values, write_gguf
from tests.support.quantized_sources import write_source

_WINDOW_TOKENS = 32
_SMALL: dict[str, Any] = {"shard_bytes": 60_000, "threads": 1}
_TEXT: dict[str, Any] = {"shard_bytes": 150_000, "threads": 1, "measure": False, "calibration": "text", "sampled": 0}
# The divergence of max-kl takes a few trials.
_SELF: dict[str, Any] = {**_TEXT, "calibration": "self", "sampled": 8}


@dataclass(frozen=True)
class Mode:
    """A way to compress.

    Attributes:
        prepare: writes a source into a folder, and returns it and the options.
        overwrite: replace an earlier output each time.
        over_itself: whether that has the same files; otherwise it is of another size.
    """

    prepare: Callable[[Path], tuple[Path, CompressOptions]]
    overwrite: bool = False
    over_itself: bool = False


@dataclass
class Outcome:
    """What a campaign found.

    Attributes:
        kills: processes that were killed while they ran.
        states: what was at the output's place afterwards, as `kind_of_place` calls it.
        faults: what was wrong, by what was found.
    """

    kills: int = 0
    states: Counter[str] = field(default_factory=Counter)
    faults: Counter[str] = field(default_factory=Counter)


def _checkpoint(folder: Path, **options: Any) -> tuple[Path, CompressOptions]:
    return write_checkpoint(folder / "model"), CompressOptions(**_SMALL, **options)


def _llama(folder: Path, **options: Any) -> tuple[Path, CompressOptions]:
    (folder / "model").mkdir()
    model = write_random_llama(folder / "model", layers=1, tied=True)
    config = json.loads((model / "config.json").read_text()) | {"max_position_embeddings": _WINDOW_TOKENS}
    (model / "config.json").write_text(json.dumps(config))
    byte_level().save(str(model / "tokenizer.json"))
    if options.get("calibration") == "text":
        options["calibration"] = folder / "text.txt"
        options["calibration"].write_text("Once upon a time there was a king who counted to 123. " * 40)
    return model, CompressOptions(**options)


def _gptq(folder: Path) -> tuple[Path, CompressOptions]:
    write_source(folder / "model", *SOURCES["GPTQ"])
    return folder / "model", CompressOptions(**_SMALL)


def _gguf(folder: Path) -> tuple[Path, CompressOptions]:
    write_gguf(folder / "model.gguf", "Q4_0", llama_values() | {"tokenizer.ggml.pre": "llama-bpe"})
    return folder / "model.gguf", CompressOptions(**_SMALL)


MODES: Mapping[str, Mode] = {
    "bits": Mode(lambda folder: _checkpoint(folder, bits=4)),
    "default": Mode(_checkpoint),
    "overwrite": Mode(lambda folder: _checkpoint(folder, bits=4), overwrite=True),
    "over-itself": Mode(lambda folder: _checkpoint(folder, bits=4), overwrite=True, over_itself=True),
    "lossless": Mode(lambda folder: _checkpoint(folder, lossless=True)),
    "gptq": Mode(_gptq),
    "gguf": Mode(_gguf),
    "text": Mode(lambda folder: _llama(folder, **_TEXT, bpw=3.5)),
    "self": Mode(lambda folder: _llama(folder, **_SELF, bpw=3.5)),
    "self-overwrite": Mode(lambda folder: _llama(folder, **_SELF, bpw=3.5), overwrite=True),
    "tune": Mode(lambda folder: _llama(folder, **_SELF, bpw=3.5, tune=True)),
    "tune-overwrite": Mode(lambda folder: _llama(folder, **_SELF, bpw=3.5, tune=True), overwrite=True),
    "max-kl": Mode(lambda folder: _llama(folder, **_SELF, max_kl=2.1)),
    "max-kl-tune-overwrite": Mode(lambda folder: _llama(folder, **_SELF, max_kl=2.1, tune=True), overwrite=True),
}


def run(name: str, *, kills: int, seconds: float = math.inf, seed: int = 0) -> Outcome:
    """Kill a mode's runs until `kills` of them were killed or `seconds` have passed.

    Every third one is killed again as it resumes.
    """
    work = Path(tempfile.mkdtemp(prefix="entrollm-kills-"))
    generator = random.Random(seed)
    outcome = Outcome()
    end = time.monotonic() + seconds
    try:
        runs = _Runs(work, MODES[name])
        while outcome.kills < kills and time.monotonic() < end:
            runs.disturb(outcome, generator)
    finally:
        shutil.rmtree(work)
    return outcome


class _Runs:
    """Runs of one mode in processes that are forked from this one, which has imported what they need."""

    def __init__(self, work: Path, mode: Mode) -> None:
        self._overwrites = mode.overwrite
        self._temporary, self._place, self._old_folder = work / "temporary", work / "place", work / "old"
        self._out = self._place / "out"
        self._temporary.mkdir()
        self._model, self._options = mode.prepare(work)
        self._duration_s = preload(self._options, self._compress)
        self._new = new = files_of(self._out)
        assert new
        if mode.over_itself:
            self._out.rename(self._old_folder)
        elif mode.overwrite:
            _run(lambda: compress(self._model, self._old_folder, CompressOptions(bpw=6.5)))
        self._old = files_of(self._old_folder)
        assert (self._old == new) == mode.over_itself

    def _reset(self) -> None:
        """Put nothing, or the earlier output, at the output's place."""
        shutil.rmtree(self._place, ignore_errors=True)
        if self._old is not None:
            shutil.copytree(self._old_folder, self._out)

    def _compress(self) -> None:
        tempfile.tempdir = str(self._temporary)
        compress(self._model, self._out, self._options, overwrite=self._overwrites)

    def disturb(self, outcome: Outcome, generator: random.Random) -> None:
        """Kill a run once or more, and end it by the same call."""
        self._reset()
        while True:
            elapsed_s, killed = _run(self._compress, generator.uniform(0, 1.1 * self._duration_s))
            if not killed:
                self._duration_s = 0.8 * self._duration_s + 0.2 * elapsed_s
                break
            outcome.kills += 1
            self._check_place(outcome)
            if (self._out.exists() and not self._overwrites) or generator.randrange(3):
                break
        if killed and (self._overwrites or not self._out.exists()):
            _run(self._compress)
        self._check_end(outcome)

    def _check_place(self, outcome: Outcome) -> None:
        state = kind_of_place(files_of(self._out), self._old, self._new)
        outcome.states[state] += 1
        if state == "half" or (state == "none" and self._old is not None):
            outcome.faults[f"{state} after a kill"] += 1

    def _check_end(self, outcome: Outcome) -> None:
        if files_of(self._out) != self._new:
            outcome.faults["other files after the same call"] += 1
        others = {path.name for path in (*self._place.iterdir(), *self._temporary.iterdir())} - {"out"}
        if not self._overwrites:
            others.discard(".out.publishing.json")  # killed when the output was complete: the next call removes it
        if others:
            outcome.faults[f"left behind: {', '.join(sorted(others))}"] += 1


def preload(options: CompressOptions, work: Callable[[], object]) -> float:
    """Work in a forked process, and import here what it has imported, so that later ones are forked with it.

    Nothing but imports is done here: threads and locks of what has worked would not outlive a fork.

    Returns:
        how long it worked, in seconds.
    """
    if options.calibration is not None:
        for name in ("entrollm.calibrate", "transformers.models.llama.modeling_llama"):
            importlib.import_module(name)  # most of the time, which is not to be spent twice
        # Compiles regular expressions for every model that transformers knows.
        importlib.import_module("transformers.conversion_mapping").get_checkpoint_conversion_mapping("llama")
    start = time.monotonic()
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        _end(lambda: (work(), os.write(write, "\n".join(sys.modules).encode())))
    os.close(write)
    with os.fdopen(read) as pipe:
        names = pipe.read().split()
    _check_code(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    elapsed_s = time.monotonic() - start
    for name in names:
        with contextlib.suppress(ImportError):  # some only look like modules
            importlib.import_module(name)
    return elapsed_s


def kind_of_place(found: Mapping[str, bytes] | None, old: Mapping[str, bytes] | None, new: Mapping[str, bytes]) -> str:
    """What is at the output's place: "none", "old", "new", "same" for both or, which must never be, "half"."""
    if found is None:
        return "none"
    if found == old == new:
        return "same"
    return "new" if found == new else "old" if found == old else "half"


def files_of(folder: Path) -> dict[str, bytes] | None:
    """The files below a folder and what they hold; None if there is no folder."""
    if not folder.exists():
        return None
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def _run(work: Callable[[], object], kill_after_s: float | None = None) -> tuple[float, bool]:
    """Work in a forked process, and kill it after some time; returns how long it took, and whether it was killed."""
    start = time.monotonic()
    child = os.fork()
    if child == 0:
        _end(work)
    end = None if kill_after_s is None else start + kill_after_s
    while True:
        pid, status = os.waitpid(child, 0 if end is None else os.WNOHANG)
        if pid:
            break
        if end is not None and time.monotonic() >= end:
            os.kill(child, signal.SIGKILL)
            end = None
        time.sleep(0.001)
    return time.monotonic() - start, _check_code(os.waitstatus_to_exitcode(status)) != 0


def _end(work: Callable[[], object]) -> NoReturn:
    """Work as the last that this process does."""
    try:
        work()
    except BaseException as error:
        os.write(2, f"{error!r}\n".encode())
        os._exit(2)
    os._exit(0)


def _check_code(code: int) -> int:
    if code not in (0, -signal.SIGKILL):
        raise RuntimeError(f"compression ended with {code}")
    return code
