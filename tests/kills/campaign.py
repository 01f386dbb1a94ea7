"""Kill compression at random moments: nothing half made is ever at its place, and the same call ends equally."""

from __future__ import annotations

import importlib
import os
import random
import shutil
import signal
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from entrollm import CompressOptions, compress
from tests.checkpoint.imported.test_damage import SOURCES
from tests.engine.tokenizers_for_tests import byte_level
from tests.support.checkpoints import write_checkpoint, write_random_llama
from tests.support.gguf_sources import llama_values, write_gguf
from tests.support.quantized_sources import write_source

_SMALL: dict[str, Any] = {"shard_bytes": 60_000, "threads": 1}
_TEXT: dict[str, Any] = {"shard_bytes": 150_000, "threads": 1, "measure": False, "calibration": "text", "sampled": 0}
_SELF: dict[str, Any] = {**_TEXT, "calibration": "self", "sampled": 8}


@dataclass(frozen=True)
class Mode:
    """A way to compress.

    Attributes:
        prepare: writes a source into a folder, and returns it and the options.
        overwrite: replace an earlier output each time.
    """

    prepare: Callable[[Path], tuple[Path, CompressOptions]]
    overwrite: bool = False


@dataclass
class Outcome:
    """What a campaign found.

    Attributes:
        kills: processes that were killed while they ran.
        states: what was at the output's place afterwards, by "none", "old" and "new".
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
    byte_level().save(str(model / "tokenizer.json"))
    if options.get("calibration") == "text":
        options["calibration"] = folder / "text.txt"
        options["calibration"].write_text("Once upon a time there was a king who counted to 123. " * 60)
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
    "lossless": Mode(lambda folder: _checkpoint(folder, lossless=True)),
    "gptq": Mode(_gptq),
    "gguf": Mode(_gguf),
    "text": Mode(lambda folder: _llama(folder, **_TEXT, bpw=3.5)),
    "self": Mode(lambda folder: _llama(folder, **_SELF, bpw=3.5)),
    "self-overwrite": Mode(lambda folder: _llama(folder, **_SELF, bpw=3.5), overwrite=True),
    "tune": Mode(lambda folder: _llama(folder, **_SELF, bpw=3.5, tune=True)),
    "max-kl": Mode(lambda folder: _llama(folder, **_SELF, max_kl=0.3)),
    "max-kl-tune-overwrite": Mode(lambda folder: _llama(folder, **_SELF, max_kl=0.3, tune=True), overwrite=True),
}


def run(name: str, *, kills: int, seed: int = 0) -> Outcome:
    """Kill a mode's runs until `kills` of them were killed; every third one is killed again as it resumes."""
    mode = MODES[name]
    work = Path(tempfile.mkdtemp(prefix="entrollm-kills-"))
    temporary = work / "temporary"
    temporary.mkdir()
    generator = random.Random(seed)
    outcome = Outcome()
    try:
        model, options = mode.prepare(work)
        import_calibration(options)
        place = work / "place"
        out = place / "out"

        def work_in_child() -> None:
            tempfile.tempdir = str(temporary)
            compress(model, out, options, overwrite=mode.overwrite)

        old = None
        if mode.overwrite:
            _run(lambda: compress(model, work / "old", CompressOptions(bpw=6.5)))
            old = files_of(work / "old")
        duration_s, _ = _run(work_in_child)
        new = files_of(out)
        assert new and new != old
        while outcome.kills < kills:
            shutil.rmtree(place)
            if old is not None:
                shutil.copytree(work / "old", out)
            while True:
                elapsed_s, killed = _run(work_in_child, generator.uniform(0, 1.1 * duration_s))
                if not killed:
                    duration_s = 0.8 * duration_s + 0.2 * elapsed_s
                    break
                outcome.kills += 1
                _check_place(outcome, files_of(out), old, new)
                if (out.exists() and not mode.overwrite) or generator.randrange(3):
                    break
            if killed and (mode.overwrite or not out.exists()):
                _run(work_in_child)
            _check_end(outcome, place, temporary, new, mode.overwrite)
    finally:
        shutil.rmtree(work)
    return outcome


def import_calibration(options: CompressOptions) -> None:
    """Import what calibration needs once, not in every process that is forked."""
    if options.calibration is not None:
        for module in ("entrollm.calibrate", "transformers.models.llama.modeling_llama"):
            importlib.import_module(module)


def kind_of_place(found: Mapping[str, bytes] | None, old: Mapping[str, bytes] | None, new: Mapping[str, bytes]) -> str:
    """What is at the output's place: "none", "old", "new" or, which must never be, "half"."""
    if found is None:
        return "none"
    return "new" if found == new else "old" if found == old else "half"


def _check_place(
    outcome: Outcome, found: Mapping[str, bytes] | None, old: Mapping[str, bytes] | None, new: Mapping[str, bytes]
) -> None:
    state = kind_of_place(found, old, new)
    outcome.states[state] += 1
    if state == "half" or (state == "none" and old is not None):
        outcome.faults[f"{state} after a kill"] += 1


def _check_end(outcome: Outcome, place: Path, temporary: Path, new: Mapping[str, bytes], overwrite: bool) -> None:
    if files_of(place / "out") != new:
        outcome.faults["other files after the same call"] += 1
    others = {path.name for path in (*place.iterdir(), *temporary.iterdir())} - {"out"}
    if not overwrite:
        others.discard(".out.publishing.json")  # killed when the output was complete: the next call removes it
    if others:
        outcome.faults[f"left behind: {', '.join(sorted(others))}"] += 1


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
        try:
            work()
        except BaseException as error:
            os.write(2, f"{error!r}\n".encode())
            os._exit(2)
        os._exit(0)
    end = None if kill_after_s is None else start + kill_after_s
    while True:
        pid, status = os.waitpid(child, 0 if end is None else os.WNOHANG)
        if pid:
            break
        if end is not None and time.monotonic() >= end:
            os.kill(child, signal.SIGKILL)
            end = None
        time.sleep(0.001)
    code = os.waitstatus_to_exitcode(status)
    if code not in (0, -signal.SIGKILL):
        raise RuntimeError(f"compression ended with {code}")
    return time.monotonic() - start, code != 0
