"""Large language models whose weights stay entropy-coded from disk to the matrix product."""

from __future__ import annotations

from entrollm import interrupts as _interrupts  # noqa: F401 (first, so that it covers the imports that follow)

# isort: split
from importlib import import_module
from typing import TYPE_CHECKING

from entrollm.errors import CorruptStreamError, EntroLLMError, FormatError, OptionError, UnsupportedError

# The function takes the place of the package of the same name, which this import has loaded already.
from entrollm.recipes import CompressOptions, Progress, compress, plan

if TYPE_CHECKING:
    from entrollm.compress.predict import SizePlan
    from entrollm.engine.load import load
    from entrollm.engine.model import Model
    from entrollm.recipes.result import CompressResult

__all__ = [
    "CompressOptions",
    "CompressResult",
    "CorruptStreamError",
    "EntroLLMError",
    "FormatError",
    "Model",
    "OptionError",
    "Progress",
    "SizePlan",
    "UnsupportedError",
    "compress",
    "load",
    "plan",
]

# Imported when they are first used, so that `import entrollm` takes milliseconds.
_HOMES = {
    "CompressResult": "entrollm.recipes.result",
    "Model": "entrollm.engine.model",
    "SizePlan": "entrollm.compress.predict",
    "load": "entrollm.engine.load",
}


def __getattr__(name: str) -> object:
    if name == "__version__":
        return import_module("importlib.metadata").version("entrollm")
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, "__version__"})
