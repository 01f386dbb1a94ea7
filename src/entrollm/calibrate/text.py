"""Cut a calibration text into windows that are spread evenly over it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from entrollm.errors import FormatError

_FEWEST_WINDOWS = 8


def calibration_windows(tokenizer: Tokenizer, path: str | Path, window: int, count: int) -> NDArray[np.int64]:
    """Tokenise a text and pick windows.

    Args:
        tokenizer: the model's.
        path: a UTF-8 text.
        window: tokens of a window.
        count: windows wanted; fewer where the text has fewer.
    Returns:
        int64, shape (windows, window).
    Raises:
        FormatError: the text is not UTF-8, or too short to calibrate with.
        OSError: it cannot be read.
    """
    try:
        text = Path(path).read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise FormatError(f"{path} is not UTF-8 text: {error}") from None
    ids = np.array(tokenizer.encode(text, add_special_tokens=False).ids, dtype=np.int64)
    available = len(ids) // window
    if available < _FEWEST_WINDOWS:
        raise FormatError(
            f"{path} has {len(ids)} tokens; calibration needs at least {_FEWEST_WINDOWS} windows of {window}"
        )
    picked = np.unique(np.linspace(0, available - 1, min(count, available)).astype(np.int64))
    windows: NDArray[np.int64] = ids[: available * window].reshape(available, window)[picked]
    return windows
