"""Compress checkpoints to coded model folders, check them, and decode them back."""

from entrollm.compress.options import CompressOptions
from entrollm.compress.pipeline import CompressResult, compress

__all__ = ["CompressOptions", "CompressResult", "compress"]
