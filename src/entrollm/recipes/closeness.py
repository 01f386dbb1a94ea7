"""Whether a compressed model stayed close to its original, and what to do if it did not."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from entrollm.compress.target import DEFAULT_BPW
from entrollm.errors import EntroLLMError, Message, Option
from entrollm.recipes.options import SELF, CompressOptions

if TYPE_CHECKING:
    from entrollm.compress.predict import SizePlan
    from entrollm.compress.result import MatrixError
    from entrollm.recipes.progress import Progress
    from entrollm.recipes.result import CompressResult

# A model is far from its original from this KL divergence on, in nats per token; at 4.5 bits, models have 0.03 to 0.1.
_FAR_KL = 0.25
# Relative errors from which a model may be that far: of all matrices together, and of a single one.
_LARGE_ERROR, _LARGE_SINGLE_ERROR = 0.13, 0.4
# KL divergences over the square of the relative error, of two real models at 2 to 5 bits per weight.
_KL_FACTORS = 8.5, 36.0
# What is aimed at by a better size: the divergence falls to a quarter with each bit.
_CLOSE_KL = 0.08
_WIDE_BITS = 5


@dataclass(frozen=True)
class _Errors:
    """The errors of a model's matrices, at bits per weight."""

    relative_error: float
    worst: MatrixError | None
    file_bits: float


def with_closeness(
    model: str | Path, result: CompressResult, options: CompressOptions, progress: Progress
) -> CompressResult:
    """A result with the measured closeness. What prevents that is stated in `unmeasured`, since the files are complete.

    Nothing is measured where nothing was rounded, or where tuning or a search has measured a divergence already.
    """
    if not options.measure or result.relative_error == 0 or result.tuning is not None or result.search is not None:
        return result
    from entrollm.evaluate.closeness import measure_closeness

    def advance(done: float, total: float) -> None:
        progress.advance("measuring", done, total)

    try:
        return replace(result, closeness=measure_closeness(model, result.path, options.threads, advance))
    except (EntroLLMError, ValueError, OSError, MemoryError) as error:
        return replace(result, unmeasured=str(error) or type(error).__name__)


def damage_of_result(result: CompressResult, options: CompressOptions) -> Message | None:
    """What to tell the user of a model that is far from its original; None if it is close."""
    errors = _Errors(result.relative_error, result.worst, result.file_bits)
    close = result.closeness
    if close is None:
        if result.tuning is not None or result.search is not None:
            return None
        return _expected_damage(errors, options)
    if close.kl <= _FAR_KL:
        return None
    return Message(
        "the model is far from its original: a KL divergence of {} nats, and the same likeliest token at {} %; {}",
        f"{close.kl:.3g}",
        f"{100 * close.top1_agreement:.0f}",
        _advice(errors, options, close.kl),
    )


def damage_of_plan(plan: SizePlan, options: CompressOptions) -> Message | None:
    """What to tell the user of a size at which a model may be far from its original; None if it is close."""
    return _expected_damage(_Errors(plan.relative_error, plan.worst, plan.file_bits), options)


def _expected_damage(errors: _Errors, options: CompressOptions) -> Message | None:
    """Judge by relative errors alone. Calibration makes them larger, and what they do smaller."""
    worst = errors.worst
    is_large = errors.relative_error > _LARGE_ERROR and options.calibration is None
    if worst is None or not (is_large or worst.relative_error > _LARGE_SINGLE_ERROR):
        return None
    low, high = (factor * errors.relative_error**2 for factor in _KL_FACTORS)
    return Message(
        "the matrices have a relative error of {}, the largest {} in {}: expect a KL divergence of {} to {} nats or "
        "more from the original, where {} bits per weight leave 0.03 to 0.1; {}",
        f"{errors.relative_error:.3f}",
        f"{worst.relative_error:.3f}",
        worst.name,
        f"{low:.2g}",
        f"{high:.2g}",
        DEFAULT_BPW,
        _advice(errors, options, high),
    )


def _advice(errors: _Errors, options: CompressOptions, kl: float) -> Message:
    if options.bits is not None or options.has_widths:
        wide = options.bits is not None and options.bits > _WIDE_BITS
        return Message("use {} in place of {}", Option("bpw", 6.0 if wide else DEFAULT_BPW), Option("bits"))
    more = math.log(max(kl, _FAR_KL) / _CLOSE_KL, 4)
    bits = min(8.0, max(DEFAULT_BPW, math.ceil((errors.file_bits + more) * 2) / 2))
    if options.calibration is not None:
        return Message("use {}", Option("bpw", bits))
    return Message("use {}, or add {}", Option("bpw", bits), Option("calibration", SELF))
