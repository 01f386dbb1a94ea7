"""Large language models whose weights stay entropy-coded from disk to the matrix product."""

from entrollm.compress import CompressOptions, compress
from entrollm.engine.load import load
from entrollm.engine.model import Model
from entrollm.errors import CorruptStreamError, EntroLLMError, FormatError, UnsupportedError

__all__ = [
    "CompressOptions",
    "CorruptStreamError",
    "EntroLLMError",
    "FormatError",
    "Model",
    "UnsupportedError",
    "compress",
    "load",
]
