"""Compress checkpoints to coded model folders, check these, and decode them back.

The inference path also imports this package, so the modules that compress are imported when they are first used.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

from entrollm.compress.options import CodingOptions, PostFit
from entrollm.compress.target import Target, parse_size

if TYPE_CHECKING:
    from entrollm.compress.folder import check_output
    from entrollm.compress.predict import SizePlan, plan, size_range
    from entrollm.compress.progress import CompressProgress
    from entrollm.compress.result import FolderResult
    from entrollm.compress.statistics import Statistics

__all__ = [
    "CodingOptions",
    "CompressProgress",
    "FolderResult",
    "PostFit",
    "SizePlan",
    "Target",
    "check_output",
    "compress_folder",
    "parse_size",
    "plan",
    "size_range",
]

_HOMES = {
    "CompressProgress": "progress",
    "FolderResult": "result",
    "SizePlan": "predict",
    "check_output": "folder",
    "plan": "predict",
    "size_range": "predict",
}


def compress_folder(
    model: str | Path,
    out: str | Path,
    options: CodingOptions | None = None,
    *,
    statistics: Statistics | None = None,
    post_fit: PostFit | None = None,
    overwrite: bool = False,
    on_progress: Callable[[CompressProgress], None] | None = None,
) -> FolderResult:
    """Quantize a checkpoint, entropy-code it and write a model folder.

    Memory stays below twice the largest tensor in float32. The folder appears when it is complete. After an
    interruption, a call with the same arguments resumes the run.

    Args:
        model: a checkpoint folder, a GGUF file or a Hub id.
        out: the folder to make.
        options: what to make; by default the paper's 4-bit grids, coded for size.
        statistics: what calibration measured of this model; needs options with a target. None if absent.
        post_fit: called with the finished folder before it appears; returns new values for stored scales, by entry
            of the file and in its type. It needs options with a target. None if absent.
        overwrite: replace an earlier output.
        on_progress: called from worker threads.
    Raises:
        FormatError: the checkpoint is malformed or has a weight that is not finite.
        UnsupportedError: the checkpoint uses something that is not implemented.
        ValueError: an option or a path is wrong.
        OSError: reading or writing failed; files that are finished are kept for the next run.
    """
    from entrollm.compress import pipeline

    return pipeline.compress_folder(
        model,
        out,
        options,
        statistics=statistics,
        post_fit=post_fit,
        overwrite=overwrite,
        on_progress=on_progress,
    )


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
