"""Calibrate a checkpoint on a text, on what the model itself writes, or on both."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from entrollm.arrays import HOST, Device
from entrollm.calibrate.joined import check_windows
from entrollm.calibrate.measure import measure
from entrollm.calibrate.network import read_config
from entrollm.calibrate.sample import sample_windows
from entrollm.calibrate.store import StoredStatistics
from entrollm.calibrate.text import calibration_windows, held_out_windows
from entrollm.checkpoint.model_folder import Checkpoint
from entrollm.checkpoint.resolve import resolve
from entrollm.compress.source import stamps
from entrollm.engine.files import read_model_files, why_no_tokenizer
from entrollm.errors import FormatError, UnsupportedError

DEFAULT_WINDOWS = 64
WINDOW_TOKENS = 512
_FEWEST_WINDOWS = 8

Action = Literal["writing", "calibrating"]


@dataclass(frozen=True)
class CalibrationText:
    """What a model is calibrated on.

    Attributes:
        file: a UTF-8 text; None to use sampled windows alone.
        windows: windows of `tokens`, or the model's context if less, spread over the text.
        sampled: windows that the model writes itself; see `sample_windows` for the memory they take, 0 for none.
        held_out: windows that `held_out_windows` gives and calibration does not see: the last ones of the file.
        seed: of the sampled windows; those held out have the next one.
        tokens: of a window.
    """

    file: str | Path | None
    windows: int = DEFAULT_WINDOWS
    sampled: int = DEFAULT_WINDOWS
    held_out: int = 0
    seed: int = 0
    tokens: int = WINDOW_TOKENS

    def __post_init__(self) -> None:
        if self.file is None and self.sampled < _FEWEST_WINDOWS:
            raise ValueError(
                f"calibration needs a text or at least {_FEWEST_WINDOWS} sampled windows, found {self.sampled}"
            )


def calibrate(
    model: str | Path,
    text: CalibrationText,
    folder: Path,
    progress: Callable[[Action, float, float], None] | None = None,
    device: Device = HOST,
    *,
    tunes: bool = False,
) -> StoredStatistics:
    """Measure what the matrices of a checkpoint see of a text, and how much their errors matter.

    Args:
        model: a checkpoint folder or a Hub id.
        text: what it reads.
        folder: where the result is kept; see `measure` for its size.
        progress: called with what is being done, and how much of it is done and in all.
        device: what computes; see `measure` for processes that share it.
        tunes: whether `Tuner` follows.
    Raises:
        EntroLLMError: the text is too short or not UTF-8, activations are not finite, or the model does not fit.
        UnsupportedError: transformers does not know the model.
        ValueError: the model has no tokenizer.
    """

    def report(action: Action) -> Callable[[float, float], None] | None:
        return None if progress is None else lambda done, total: progress(action, done, total)

    source = _Source(model)
    parts = []
    with Checkpoint.open(source.path) as checkpoint:
        opened = stamps(checkpoint)
        tokens = source.tokens(checkpoint, text.tokens)
        if text.file is not None:
            parts.append(calibration_windows(source.tokenizer(), text.file, tokens, text.windows, text.held_out))
            _check_tokens(checkpoint, parts[0])
        check_windows(sum(map(len, parts)) + text.sampled, device.group)
        if text.sampled:
            parts.append(sample_windows(checkpoint, (text.sampled, tokens), text.seed, report("writing"), device))
        measured = measure(checkpoint, np.concatenate(parts), folder, report("calibrating"), device, tunes=tunes)
        measured.source = opened
        return measured


def held_out(model: str | Path, text: CalibrationText, device: Device = HOST) -> NDArray[np.int64]:
    """Windows, shape (text.held_out, tokens), that a calibration on `text` does not see.

    Args and errors as for `calibrate`.
    """
    source = _Source(model)
    with Checkpoint.open(source.path) as checkpoint:
        tokens = source.tokens(checkpoint, text.tokens)
        if text.file is not None:
            return held_out_windows(source.tokenizer(), text.file, tokens, text.held_out)
        return sample_windows(checkpoint, (text.held_out, tokens), text.seed + 1, device=device)


def _check_tokens(checkpoint: Checkpoint, windows: NDArray[np.int64]) -> None:
    """Refuse the tokens of another model's tokenizer.

    Raises:
        FormatError: the model does not know a token.
    """
    known = getattr(read_config(checkpoint).get_text_config(), "vocab_size", None)
    if known is not None and windows.max() >= known:
        raise FormatError(
            f"{checkpoint.path}: tokenizer.json makes token {windows.max()} of the text, and the model knows {known}; "
            "the tokenizer belongs to another model"
        )


class _Source:
    """A checkpoint's configuration and tokenizer."""

    def __init__(self, model: str | Path) -> None:
        self.path = resolve(model)
        self._files = read_model_files(self.path)
        if "text_config" in self._files.config:
            raise UnsupportedError(f"{self.path}: calibration covers models of text alone; compress it without")

    def tokens(self, checkpoint: Checkpoint, wanted: int) -> int:
        """Tokens of a window."""
        context = getattr(read_config(checkpoint).get_text_config(), "max_position_embeddings", None)
        return min(wanted, context or wanted)

    def tokenizer(self) -> Tokenizer:
        if self._files.tokenizer is None:
            raise ValueError(why_no_tokenizer(self.path, "reading a calibration text"))
        return self._files.tokenizer
