"""Calibrate a checkpoint on a text."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from entrollm.calibrate.text import calibration_windows
from entrollm.calibrate.walk import StoredFactors, measure
from entrollm.checkpoint import Checkpoint, resolve
from entrollm.engine.fields import Fields
from entrollm.engine.files import read_model_files
from entrollm.engine.models import read_config

DEFAULT_WINDOWS = 128
_WINDOW = 512


def calibrate(
    model: str | Path,
    text: str | Path,
    folder: Path,
    windows: int = DEFAULT_WINDOWS,
    progress: Callable[[float, float], None] | None = None,
) -> StoredFactors:
    """Measure what the matrices of a checkpoint see of a text.

    Args:
        model: a checkpoint folder or a Hub id.
        text: a UTF-8 file.
        folder: where the result is kept; see `measure` for its size.
        windows: windows of 512 tokens, or the model's context if less, spread over the text.
        progress: called after each layer with the layers done and in all.
    Raises:
        EntroLLMError: the text is too short or not UTF-8, or activations are not finite.
        UnsupportedError: the engine does not run this model.
        ValueError: the model has no tokenizer.
    """
    path = resolve(model)
    files = read_model_files(path)
    if files.tokenizer is None:
        raise ValueError(f"{path} has no tokenizer.json, which reading a calibration text needs")
    config = read_config(Fields(files.config, "config.json"))
    ids = calibration_windows(files.tokenizer, text, min(_WINDOW, config.context_length), windows)
    with Checkpoint.open(path) as checkpoint:
        return measure(checkpoint, config, ids, folder, progress)
