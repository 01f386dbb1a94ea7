"""The standard streams of a command, which its caller may have closed, or connected to a full disk."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import IO

STDOUT = "standard output"
"""The name of the stream in errors."""


def prepare_streams() -> None:
    """Open the streams that are closed on nothing, and let no character fail that a stream's encoding lacks.

    Without it, the next file that is opened would take the place of a closed stream.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        stream = getattr(sys, name)
        if stream is None:
            descriptor = os.open(os.devnull, os.O_RDWR)  # the lowest that is free, so that of the stream
            setattr(sys, name, os.fdopen(descriptor, mode, encoding="utf-8"))
        elif isinstance(stream, io.TextIOWrapper):
            # Pipes have the legacy code page on Windows, which lacks most of what a model may read or write.
            encoding = "utf-8" if sys.platform == "win32" else stream.encoding
            stream.reconfigure(encoding=encoding, errors=stream.errors if mode == "r" else "backslashreplace")


@contextmanager
def naming_stdout() -> Iterator[None]:
    """Give errors of writing to standard output its name, as errors of files have theirs."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = STDOUT
        raise


def write_stdout(text: str) -> None:
    """Write to standard output at once.

    Raises:
        OSError: the stream does not take it; the error names the stream.
    """
    with naming_stdout():
        sys.stdout.write(text)
        sys.stdout.flush()


def discard(stream: IO[str]) -> None:
    """Send what a broken stream still buffers, and all that follows, nowhere; otherwise Python's exit fails too."""
    with suppress(OSError):  # a stream of tests has no descriptor
        nowhere = os.open(os.devnull, os.O_WRONLY)
        try:
            os.dup2(nowhere, stream.fileno())
        finally:
            os.close(nowhere)
