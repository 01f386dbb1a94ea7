"""What a user may ask of a compression run."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from numpy.typing import NDArray

if TYPE_CHECKING:
    from entrollm.codec.choose import Prefer
    from entrollm.codec.cost import Processor
    from entrollm.compress.target import Target
    from entrollm.quantize.paper import Granularity
    from entrollm.quantize.select import BitsOverride

Method = Literal["feedback", "gptq"]
PostFit = Callable[[Path], Mapping[str, NDArray[Any]]]
"""From a compressed folder to other values for some of its stored scales, by their entry in the file."""


@dataclass(frozen=True, slots=True)
class CompressOptions:
    """Options of `compress`; all but `threads` decide the result.

    Attributes:
        bits: width of the grid of a matrix, 2 to 8; None for 4, or the integers that a checkpoint has already.
        target: a size to meet; the grids then follow from it, not from `bits` and `granularity`.
        fine_scales: scales are stored about 2 bits finer than pays by itself, for a post_fit to move them.
        method: what a calibrated matrix is quantized by: "feedback", or "gptq" to compare with.
        drift: whether a matrix that is calibrated, by "feedback", makes up for what those before it have become.
        granularity: one grid per tensor, as in the paper, or one per row.
        overrides: bits per tensor by glob, or None to keep the tensor's type; a later match wins.
        prefer: "size" for the fewest bits, "speed" for the fastest decoding, "fixed" for no entropy coding.
        processor: the kind whose decoding times count.
        shard_bytes: source bytes that share an output file; an interrupted run resumes after the last whole one.
        tokenizer: a folder whose tokenizer files go with the model in place of its own.
        threads: worker threads; None for one per core.
    """

    bits: int | None = None
    target: Target | None = None
    method: Method = "feedback"
    drift: bool = True
    fine_scales: bool = False
    granularity: Granularity = "tensor"
    overrides: Sequence[BitsOverride] = ()
    prefer: Prefer = "size"
    processor: Processor = "x86"
    shard_bytes: int = 1 << 30
    tokenizer: Path | None = None
    threads: int | None = None
