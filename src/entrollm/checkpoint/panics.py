"""Failures of the tokenizers library: plain Exceptions, and panics, which are outside of Python's usual ones."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from tokenizers import Tokenizer

from entrollm.errors import FormatError

_SOURCE = "tokenizer.json"


@contextmanager
def panics_named(source: object) -> Iterator[None]:
    """Raise a failure of the tokenizers library as an error that names a file.

    Args:
        source: the file, or what stands for it.
    Raises:
        FormatError: the library failed, which tokenizers with contradictions in them make it do.
    """
    try:
        yield
    except BaseException as error:
        # The library raises Exception itself, and no class of its own.
        if type(error) is not Exception and type(error).__name__ != "PanicException":
            raise
        raise FormatError(
            f"{source}: the tokenizers library fails on it ({error}); fetch it again, or make it anew with "
            "transformers' save_pretrained"
        ) from None


def encode(tokenizer: Tokenizer, text: str, *, add_special_tokens: bool) -> list[int]:
    """The token ids of a text.

    Raises:
        FormatError: the library failed, as it does where an expression of the tokenizer takes too long.
    """
    with panics_named(_SOURCE):
        return list(tokenizer.encode(text, add_special_tokens=add_special_tokens).ids)


def decode(tokenizer: Tokenizer, ids: Sequence[int], *, skip_special_tokens: bool) -> str:
    """The text of token ids.

    Raises:
        FormatError: the library failed.
    """
    with panics_named(_SOURCE):
        return tokenizer.decode(ids, skip_special_tokens=skip_special_tokens)
