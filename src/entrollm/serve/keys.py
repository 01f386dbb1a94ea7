"""API keys, compared without telling how far a wrong one is right."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Sequence
from pathlib import Path


class Keys:
    """The keys that clients may use.

    Args:
        keys: at least one, none of them empty.
    """

    def __init__(self, keys: Sequence[str]) -> None:
        self._digests = [_digest(key) for key in keys]

    def owner(self, header: str | None) -> int | None:
        """The number of the key in an Authorization header, `None` if it is none of them.

        Every key is compared in full, in constant time, so that the answer's time tells nothing.
        """
        scheme, _, key = (header or "").partition(" ")
        digest = _digest(key.strip())
        matches = [hmac.compare_digest(digest, known) for known in self._digests]
        return matches.index(True) if any(matches) and scheme.lower() == "bearer" else None


def read_keys(path: Path) -> Keys:
    """Read one key per line; empty lines and those that begin with # are skipped.

    Raises:
        ValueError: there is no key, or a key holds a space or a character outside ASCII.
        OSError: the file cannot be read.
    """
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text: {error}") from None
    keys = [line for line in lines if line and not line.startswith("#")]
    if not keys:
        raise ValueError(f"{path} holds no key; write one per line")
    for number, line in enumerate(lines, 1):
        if line in keys and not (line.isascii() and line.isprintable() and " " not in line):
            raise ValueError(f"{path}, line {number}: a key may hold no spaces and only ASCII characters")
    return Keys(keys)


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()
