"""Calibrate a checkpoint on a text, on what the model itself writes, or on both."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np

from entrollm.calibrate.sample import sample_windows
from entrollm.calibrate.store import StoredStatistics
from entrollm.calibrate.text import calibration_windows
from entrollm.calibrate.walk import measure
from entrollm.checkpoint import Checkpoint, resolve
from entrollm.engine.fields import Fields
from entrollm.engine.files import read_model_files
from entrollm.engine.models import read_config

DEFAULT_WINDOWS = 64
_WINDOW = 512
_FEWEST_WINDOWS = 8


def calibrate(
    model: str | Path,
    text: str | Path | None,
    folder: Path,
    windows: int = DEFAULT_WINDOWS,
    sampled: int = DEFAULT_WINDOWS,
    progress: Callable[[str, float, float], None] | None = None,
) -> StoredStatistics:
    """Measure what the matrices of a checkpoint see of a text, and how much their errors matter.

    Args:
        model: a checkpoint folder or a Hub id.
        text: a UTF-8 file; None to use sampled windows alone.
        folder: where the result is kept; see `measure` for its size.
        windows: windows of 512 tokens, or the model's context if less, spread over the text.
        sampled: windows that the model writes itself; see `sample_windows` for the memory it takes, 0 for none.
        progress: called with what is being done, and how much of it is done and in all.
    Raises:
        EntroLLMError: the text is too short or not UTF-8, or activations are not finite.
        UnsupportedError: the engine does not run this model.
        ValueError: the model has no tokenizer, or there is nothing to calibrate on.
    """
    if text is None and sampled < _FEWEST_WINDOWS:
        raise ValueError(f"calibration needs a text or at least {_FEWEST_WINDOWS} sampled windows, found {sampled}")
    path = resolve(model)
    files = read_model_files(path)
    config = read_config(Fields(files.config, "config.json"))
    tokens = min(_WINDOW, config.context_length)
    parts = []
    if text is not None:
        if files.tokenizer is None:
            raise ValueError(f"{path} has no tokenizer.json, which reading a calibration text needs")
        parts.append(calibration_windows(files.tokenizer, text, tokens, windows))

    def report(action: str) -> Callable[[float, float], None] | None:
        return None if progress is None else lambda done, total: progress(action, done, total)

    with Checkpoint.open(path) as checkpoint:
        if sampled:
            parts.append(sample_windows(checkpoint, config, (sampled, tokens), progress=report("writing")))
        return measure(checkpoint, config, np.concatenate(parts), folder, report("calibrating"))
