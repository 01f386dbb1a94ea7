"""Compression with calibration: measure a model on a text, compress it, tune its scales, search for its size."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from entrollm.arrays import Device
from entrollm.calibrate import (
    DEFAULT_WINDOWS,
    WINDOW_TOKENS,
    CalibrationText,
    StoredStatistics,
    Tuner,
    calibrate,
    check_predicts,
    check_windows,
    compare,
    follow,
    held_out,
)
from entrollm.checkpoint.model_folder import Checkpoint
from entrollm.checkpoint.resolve import resolve
from entrollm.compress import CodingOptions, check_output, compress_folder
from entrollm.compress.folder import check_replaced
from entrollm.compress.pipeline import side_contents
from entrollm.compress.planning import make_plan, with_size
from entrollm.compress.target import DEFAULT_TARGET
from entrollm.engine.files import read_model_files
from entrollm.evaluate.divergence import Divergence, summarize_divergences
from entrollm.models import read_config
from entrollm.models.config_fields import Fields
from entrollm.processes import ALONE, Group
from entrollm.recipes.device import open_device
from entrollm.recipes.options import SELF, CompressOptions
from entrollm.recipes.progress import Progress, Silent, report_weights
from entrollm.recipes.result import CompressResult
from entrollm.recipes.search import DivergenceLimit, Measure, compress_within
from entrollm.system import scratch_folder

# What the light method reads: of a text, and as much again that the model writes.
LIGHT_WINDOWS, LIGHT_TOKENS = 16, 128
# Windows that max_kl and tune measure on.
_HELD_OUT_WINDOWS = 16


def compress_calibrated(
    model: str | Path,
    out: Path,
    options: CompressOptions,
    *,
    overwrite: bool,
    progress: Progress,
    group: Group = ALONE,
) -> CompressResult:
    """Do what `entrollm.compress` documents, for options with a calibration text, and close the group.

    Statistics are kept in a temporary folder while this runs; see `entrollm.calibrate.measure` for their size.
    """
    coding = options.coding()
    check_output(out, overwrite)
    _check_plan(model, out, coding)
    if options.tune:
        check_predicts(model, "tuning")
    elif options.max_kl is not None and options.device != "cpu":
        check_predicts(model, "a search for a divergence")
    elif options.max_kl is not None:
        # Raises if the engine, which measures divergences on processors, does not run the model.
        read_config(Fields(read_model_files(resolve(model)).config, "config.json"))
    device = open_device(options.device, group)
    with scratch_folder("entrollm-calibration-") as folder, device.guard():
        statistics, windows, tuner = _calibrated(model, options, device, folder, progress)
        post_fit = None if tuner is None else _reported(tuner, group, progress)
        search = None
        if options.max_kl is None:
            written = compress_folder(
                model,
                out,
                coding,
                statistics=statistics,
                post_fit=post_fit,
                overwrite=overwrite,
                on_progress=report_weights(progress),
            )
        else:
            assert windows is not None  # `_text` holds some out
            written, search = compress_within(
                model,
                out,
                coding,
                DivergenceLimit(options.max_kl, windows, _measure(model, windows, options, device)),
                statistics=statistics,
                post_fit=post_fit,
                overwrite=overwrite,
                progress=progress,
            )
    group.from_first(None)
    group.close()
    return CompressResult.of(written, None if tuner is None else tuner.result, search)


def assist(model: str | Path, options: CompressOptions, group: Group) -> None:
    """Do the part of a process but the first one of a group that shares a calibration, and close the group.

    Args:
        model, options: those that the first process calls `compress` with.
        group: the processes.
    Raises:
        EntroLLMError: a process has ended, or this one does not see what the first one writes.
    """
    device = open_device(options.device, group)
    with scratch_folder("entrollm-calibration-") as folder, device.guard():
        statistics, windows, tuner = _calibrated(model, options, device, folder, Silent())
        tasks: dict[str, Callable[[Path], Any]] = {}
        if tuner is not None:
            tasks["tune"] = tuner
        if windows is not None:
            tasks["compare"] = lambda made: compare(model, made, windows, device, options.threads)
        follow(model, statistics, tasks)
    group.close()


def _calibrated(
    model: str | Path, options: CompressOptions, device: Device, folder: Path, progress: Progress
) -> tuple[StoredStatistics, NDArray[np.int64] | None, Tuner | None]:
    """What every process has measured, the windows that are held out, and what tunes."""
    text = _text(options)
    check_windows((0 if text.file is None else text.windows) + text.sampled, device.group)
    windows = held_out(model, text, device) if text.held_out else None
    statistics = calibrate(model, text, folder, progress.advance, device, tunes=options.tune)
    if not options.tune:
        return statistics, windows, None
    assert windows is not None  # `_text` holds some out
    return statistics, windows, Tuner(model, statistics.windows, windows, device, options.threads)


def _measure(model: str | Path, windows: NDArray[np.int64], options: CompressOptions, device: Device) -> Measure | None:
    """What measures divergences where a GPU calibrates; None for the engine, which is faster on processors."""
    if options.device == "cpu":
        return None

    def measure(folder: Path) -> Divergence:
        device.group.from_first(("compare", str(folder.absolute())))
        return summarize_divergences(*compare(model, folder, windows, device, options.threads))

    return measure


def _check_plan(model: str | Path, out: Path, coding: CodingOptions) -> None:
    """Check before calibration what `compress_folder` would refuse after it, such as a checkpoint that is quantized.

    Raises:
        ValueError: an option does not suit the checkpoint, or the output would replace files of others.
    """
    sized = replace(coding, target=coding.target or DEFAULT_TARGET)
    with Checkpoint.open(resolve(model)) as checkpoint:
        make_plan(checkpoint, with_size(checkpoint, sized))
        check_replaced(out, side_contents(checkpoint, coding))


def _text(options: CompressOptions) -> CalibrationText:
    assert options.calibration is not None
    measures = options.tune or options.max_kl is not None
    is_light = options.method == "light"
    default = LIGHT_WINDOWS if is_light else DEFAULT_WINDOWS
    return CalibrationText(
        None if options.calibration == SELF else options.calibration,
        windows=default,
        sampled=default if options.sampled is None else options.sampled,
        tokens=LIGHT_TOKENS if is_light else WINDOW_TOKENS,
        held_out=_HELD_OUT_WINDOWS if measures else 0,
        seed=options.seed,
    )


def _reported(tuner: Tuner, group: Group, progress: Progress) -> Callable[[Path], dict[str, NDArray[Any]]]:
    """A tuner that reports how far it is, and lets the others tune too."""

    def post_fit(folder: Path) -> dict[str, NDArray[Any]]:
        group.from_first(("tune", str(folder.absolute())))
        return tuner(folder, lambda done, total: progress.advance("tuning", done, total))

    return post_fit
