"""Cut a calibration text into windows that are spread evenly over it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from entrollm.checkpoint.panics import encode
from entrollm.errors import FormatError

_FEWEST_WINDOWS = 8


def held_out_windows(tokenizer: Tokenizer, path: str | Path, window: int, count: int) -> NDArray[np.int64]:
    """The last windows of a text, to measure a model on that was calibrated with `held_out` of them.

    Args and errors as for `calibration_windows`.
    """
    windows = _all_windows(tokenizer, path, window, _FEWEST_WINDOWS + count)
    return windows[-count:]


def calibration_windows(
    tokenizer: Tokenizer, path: str | Path, window: int, count: int, held_out: int = 0
) -> NDArray[np.int64]:
    """Tokenise a text and pick windows.

    Args:
        tokenizer: the model's.
        path: a UTF-8 text.
        window: tokens of a window.
        count: windows wanted; fewer where the text has fewer.
        held_out: windows at the end of the text that are left for measuring.
    Returns:
        int64, shape (windows, window).
    Raises:
        FormatError: the text is not UTF-8, or too short to calibrate with.
        OSError: it cannot be read.
    """
    windows = _all_windows(tokenizer, path, window, _FEWEST_WINDOWS + held_out)
    available = len(windows) - held_out
    picked = np.unique(np.linspace(0, available - 1, min(count, available)).astype(np.int64))
    return windows[picked]


def _all_windows(tokenizer: Tokenizer, path: str | Path, window: int, fewest: int) -> NDArray[np.int64]:
    try:
        text = Path(path).read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise FormatError(f"{path} is not UTF-8 text: {error}") from None
    ids = np.array(encode(tokenizer, text, add_special_tokens=False), dtype=np.int64)
    available = len(ids) // window
    if available < fewest:
        raise FormatError(f"{path} has {len(ids)} tokens; calibration needs at least {fewest} windows of {window}")
    windows: NDArray[np.int64] = ids[: available * window].reshape(available, window)
    return windows
