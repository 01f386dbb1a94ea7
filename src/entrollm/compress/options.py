"""How a folder is quantized and coded; `entrollm.recipes` has the options that users see."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from entrollm.codec.choose import Prefer
    from entrollm.codec.cost import Processor
    from entrollm.compress.target import Target
    from entrollm.quantize.paper import Granularity
    from entrollm.quantize.select import BitsOverride

Method = Literal["feedback", "light", "gptq"]
PostFit = Callable[[Path], "Mapping[str, NDArray[Any]]"]
"""Given a compressed folder, returns new values for some of its stored scales, by their entry in the file."""
ALL_MATRICES = "*"
"""The glob of `lossless` with which every matrix is coded bit for bit."""
DEFAULT_BITS = 4
"""Bits of the paper's grids where only the bits of other tensors are given."""


@dataclass(frozen=True, slots=True)
class CodingOptions:
    """Options of `compress_folder`. All but `threads` affect the result.

    Attributes:
        bits: width of the paper's grid of a matrix, 2 to 8; None if absent.
        target: a size to meet, which then sets the grids in place of `bits` and `granularity`; None if absent. Without
            `bits`, a target and bits in `overrides`, a quantized checkpoint keeps its integers, and any other gets
            `DEFAULT_TARGET`.
        method: how calibrated matrices are quantized: "feedback", "light" for steps of matrices and columns alone, or
            "gptq" for comparison.
        drift: whether "feedback" makes each calibrated matrix compensate for the errors of those before it.
        trellis: whether weights lie on two grids, which the weights before them choose between.
        fine_scales: whether scales are stored about 2 bits finer than pays by itself, so that a post_fit can move them.
        granularity: one grid per tensor, as in the paper, or one per row.
        overrides: bits of the tensors that match a glob, or None for those that keep their type; the last match wins.
        lossless: globs of matrices that are coded bit for bit; they win over widths, and tensors that keep their type
            win over them. With "*", every matrix is, and no target is needed.
        prefer: "size" for the fewest bits, "speed" for the fastest decoding, "fixed" for no entropy coding.
        processor: what will run the model, with "speed".
        shard_bytes: source bytes that go into one output file; an interrupted run resumes after the last whole file.
        tokenizer: a folder whose tokenizer files replace those of the model; None if absent.
        threads: worker threads; None for one per core.
    """

    bits: int | None = None
    target: Target | None = None
    method: Method = "feedback"
    drift: bool = True
    trellis: bool = False
    fine_scales: bool = False
    granularity: Granularity = "tensor"
    overrides: Sequence[BitsOverride] = ()
    lossless: Sequence[str] = ()
    prefer: Prefer = "size"
    processor: Processor = "x86"
    shard_bytes: int = 1 << 30
    tokenizer: Path | None = None
    threads: int | None = None
