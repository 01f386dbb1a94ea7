"""Cut a text into the windows on which models are measured.

The whole text is tokenised at once without special tokens and cut into windows of `window` tokens that do not
overlap; the remainder is dropped. Each window is read from an empty context and gives window - 1 predictions.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from entrollm.checkpoint.panics import encode
from entrollm.errors import Message, Option, OptionError

DEFAULT_WINDOW = 512


@dataclass(frozen=True)
class Protocol:
    """How a text is cut into windows.

    Attributes:
        window: tokens that the model reads at once, at least 2.
        max_windows: how many windows to use, from the start of the text; `None` for all.
        bos_id: a token to put first in each window, in place of one token of the text; `None` if absent.
    """

    window: int = DEFAULT_WINDOW
    max_windows: int | None = None
    bos_id: int | None = None

    def __post_init__(self) -> None:
        if self.window < 2:
            raise ValueError(f"a window must hold at least 2 tokens, found {self.window}")
        if self.max_windows is not None and self.max_windows < 1:
            raise ValueError(f"at least 1 window must be evaluated, found {self.max_windows}")


@dataclass(frozen=True)
class Windows:
    """The windows of a text, and its size, from which bits per byte follow.

    Attributes:
        ids: token ids, int64, shape (windows, window).
        text_tokens: tokens of the whole text, the dropped remainder included.
        text_bytes: bytes of the whole text in UTF-8.
    """

    ids: NDArray[np.int64]
    text_tokens: int
    text_bytes: int


def cut_windows(tokenizer: Tokenizer, text: str, protocol: Protocol) -> Windows:
    """Tokenise a text and cut it into windows.

    Raises:
        ValueError: the text does not fill one window.
    """
    ids = np.array(encode(tokenizer, text, add_special_tokens=False), dtype=np.int64)
    wanted = protocol.window if protocol.bos_id is None else protocol.window - 1
    count = len(ids) // wanted
    if count == 0:
        raise OptionError(
            f"the text has {len(ids)} tokens, and one window takes {wanted}",
            hint=Message("use a longer text or a smaller {}", Option("window")),
        )
    if protocol.max_windows is not None:
        count = min(count, protocol.max_windows)
    windows = ids[: count * wanted].reshape(count, wanted)
    if protocol.bos_id is not None:
        windows = np.hstack([np.full((count, 1), protocol.bos_id, dtype=np.int64), windows])
    return Windows(windows, len(ids), len(text.encode("utf-8")))


def read_text(path: str | Path) -> str:
    """Read a UTF-8 file without changing its line ends.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is not UTF-8.
    """
    try:
        return Path(path).read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: {error}") from None
