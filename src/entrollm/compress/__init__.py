"""Compress checkpoints to coded model folders, check them, and decode them back."""

from entrollm.compress.folder import check_output
from entrollm.compress.options import CompressOptions
from entrollm.compress.pipeline import CompressResult, compress
from entrollm.compress.predict import SizePlan, plan, size_range
from entrollm.compress.target import Target, parse_size

__all__ = [
    "CompressOptions",
    "CompressResult",
    "SizePlan",
    "Target",
    "check_output",
    "compress",
    "parse_size",
    "plan",
    "size_range",
]
