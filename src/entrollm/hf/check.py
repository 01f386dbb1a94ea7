"""Check the packages that this one needs, before the modules that use them are imported."""

from __future__ import annotations

import importlib.metadata
import re

# The same versions as in the extra `hf`.
_OLDEST = {"torch": (2, 6), "transformers": (5, 23), "accelerate": (1, 1)}


def check_packages() -> None:
    """Check that torch and the packages around it are installed and new enough.

    Raises:
        ImportError: one is not; the message says which one, and the command to install it.
    """
    for name, oldest in _OLDEST.items():
        wanted = ".".join(map(str, oldest))
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found = "which is missing"
        else:
            if tuple(int(number) for number in re.findall(r"\d+", version)[:2]) >= oldest:
                continue
            found = f"found {version}"
        raise ImportError(f"entrollm.hf needs {name} {wanted} or newer, {found}; run: pip install 'entrollm[hf]'")


check_packages()
