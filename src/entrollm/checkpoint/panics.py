"""Panics of the tokenizers library, which are exceptions outside of Python's usual ones."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from entrollm.errors import FormatError


@contextmanager
def panics_named(source: object) -> Iterator[None]:
    """Raise a panic of the tokenizers library as an error that names a file.

    Args:
        source: the file, or what stands for it.
    Raises:
        FormatError: the library panicked, which tokenizers with contradictions in them make it do.
    """
    try:
        yield
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        raise FormatError(
            f"{source}: the tokenizers library fails on it ({error}); fetch it again, or make it anew with "
            "transformers' save_pretrained"
        ) from None
